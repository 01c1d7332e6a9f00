"""Sample, judge and time the models of the digits experiment: compiled, dense or block-sparse."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from blade_compile.diagnosis import explain
from blade_compile.distill.digits_arms import Way
from blade_compile.distill.digits_data import NUM_CLASSES
from blade_compile.distill.digits_judge import Score, load_judge, real_clips, score
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer, sample
from blade_compile.distill.digits_rows import FOLDER
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.export import read_record
from blade_compile.distill.randomness import generator

JUDGE_FILE = FOLDER / "judge.safetensors"
TIMED_BATCH = 10
_REFERENCE_CLIPS = 1000
_REAL_SEED = 100  # of real clips that are judged like an arm's: others than those of the reference


def starts(config: DigitsConfig, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The noise and the classes that every arm of a seed is sampled from.

    Returns:
        Noise fp32 ``[count, 1, T, H, W]`` and labels int64 ``[count]``: 0, 1, .. 9, 0, ..
    """
    shape = (count, 1, config.frames, config.size, config.size)
    return torch.randn(shape, generator=generator(seed, "digits evaluation")), torch.arange(count) % NUM_CLASSES


def judged(clips: Tensor, labels: Tensor, config: DigitsConfig) -> Score:
    """The judge's numbers, against real held-out clips of as many of each class."""
    judge, reference = _judge(config)
    return score(judge, clips.float().cpu(), labels, reference)


@cache
def _judge(config: DigitsConfig) -> tuple[Any, Tensor]:
    return load_judge(JUDGE_FILE), real_clips(config.clips, _REFERENCE_CLIPS)[0]


def real(config: DigitsConfig, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Real held-out clips to judge as if a model had made them, and their labels."""
    return real_clips(config.clips, count, seed=_REAL_SEED + seed)


def read_export(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a student and its record.

    Args:
        folder: what the trainer exported.

    Raises:
        ConfigError: it is no export, or one without its weights.
    """
    record = read_record(folder)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} lacks transformer/*.safetensors; remove {folder.parent} to train it again")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, record


class Sampler:
    """One transformer, dense under Inductor and sparse under blade, whose weights are exchanged without recompiling.

    Args:
        template: a model of the right sizes.
        options: of ``backend="blade"``.
    """

    def __init__(self, template: DigitsTransformer, options: Mapping[str, Any]) -> None:
        self.config = template.config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models = {sparse: deepcopy(template).to(self.device) for sparse in (False, True)}
        self.run: dict[bool, Any] = {
            False: torch.compile(self.models[False], dynamic=False),
            True: torch.compile(self.models[True], backend="blade", options=dict(options), dynamic=False),
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights."""
        for model in self.models.values():
            model.load_state_dict({name: tensor.to(self.device) for name, tensor in weights.items()})

    def draw(self, way: Way, noise: Tensor, labels: Tensor) -> Tensor:
        """Sample one batch. Returns clips fp32 ``[B, 1, T, H, W]`` on the CPU."""
        given = noise.to(self.device), labels.to(self.device)
        return sample(self.run[way.sparse], *given, steps=way.steps, cfg_scale=way.cfg_scale).cpu()

    def draw_all(
        self,
        way: Way,
        noise: Tensor,
        labels: Tensor,
        batch: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """Sample in batches, and tell how many clips are there."""
        parts: list[Tensor] = []
        for x, y in zip(noise.split(batch), labels.split(batch)):
            parts.append(self.draw(way, x, y))
            progress(sum(map(len, parts)), len(noise))
        return torch.cat(parts)

    def density(self, sparse: bool, noise: Tensor, labels: Tensor) -> float:
        """Kept share of the blocks, counted halfway down the noise, mean over the attention calls; 1 where dense.

        Raises:
            ConfigError: an attention call that should be sparse is not.
        """
        if not sparse:
            return 1.0
        x, y = noise.to(self.device), labels.to(self.device)
        with torch.no_grad():
            sites = list(explain(self.run[True], x, x.new_full((len(x),), 0.5), y))
        counted = [site.density for site in sites if site.density is not None]
        if not sites or len(counted) < len(sites):
            why = ", ".join(sorted({site.reason for site in sites if site.density is None})) or "no attention was found"
            raise ConfigError(f"{len(sites) - len(counted)} of {len(sites)} attention calls did not run sparse: {why}")
        return sum(counted) / len(counted)

    def seconds(self, ways: Sequence[Way], rounds: int = 5) -> dict[Way, float]:
        """Time of a clip each way, in batches of ten: median over rounds in which the ways take turns.

        The first, unmeasured round compiles.
        """
        noise, labels = starts(self.config, TIMED_BATCH, 0)
        times: dict[Way, list[float]] = {way: [] for way in ways}
        for one in range(rounds + 1):
            for way, taken in times.items():
                start = time.perf_counter()
                self.draw(way, noise, labels)
                if one:
                    taken.append((time.perf_counter() - start) / TIMED_BATCH)
        return {way: median(taken) for way, taken in times.items()}
