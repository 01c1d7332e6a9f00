"""The training loop: roll-out, the critic's updates, the student's update, the average; checkpoints and the export.

A step is one update of the student with the critic's updates before it. What a step does is a function of the weights,
the optimizers' state and (seed, step): resumed from a checkpoint, a run gives what it would have given uninterrupted.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from blade_compile.distill import checkpoints, preflight
from blade_compile.distill.adapters import load_adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.divergence import Divergence
from blade_compile.distill.errors import ConfigError, DivergedError
from blade_compile.distill.export import check_target
from blade_compile.distill.matching import Condition, Draws, Matching, RollOut
from blade_compile.distill.preview import Preview, to_device
from blade_compile.distill.progress import Progress
from blade_compile.distill.randomness import choice, prompt_of
from blade_compile.distill.ranks import Ranks, ranks
from blade_compile.distill.roles import TRAINED, Role
from blade_compile.distill.run_folder import RunFolder
from blade_compile.distill.shutdown import Shutdown
from blade_compile.distill.trackers import Tracker, open_tracker
from blade_compile.distill.train_state import TrainState

_TIME_IS_UP = 1000  # above every signal's number


def train(config: RunConfig, *, resume: str = "auto") -> int:
    """Distil.

    Args:
        config: of the run.
        resume: "auto": go on from the newest whole checkpoint of the run's folder, if there is one; "never": start
            anew; else the folder of a checkpoint.

    Returns:
        The exit code: 0 done, or checkpointed after SIGTERM, SIGUSR1 or ``loop.stop_after_minutes``; 130 checkpointed
        after SIGINT.

    Raises:
        ConfigError: the run can't be done as configured, or the checkpoint is another run's.
        DataError: prompts, embeddings or the checkpoint are missing or damaged, or nothing can be written.
        DivergedError: a loss or gradient is no number any more, or exploded. What was bad is not in any checkpoint.
    """
    with Shutdown() as shutdown, ranks() as here, Progress(config.loop.max_steps, quiet=not here.first) as progress:
        return Trainer(config, here, shutdown, progress, resume).run()


class _Pass(NamedTuple):
    """One accumulation pass of this rank."""

    draws: Draws
    condition: Condition
    rolled: RollOut


class Trainer:
    """One run, from its checks to its export."""

    def __init__(
        self, config: RunConfig, here: Ranks, shutdown: Shutdown, progress: Progress, resume: str = "auto"
    ) -> None:
        """Check everything, load the model, and go back to the checkpoint if there is one."""
        self.config, self.here, self.shutdown, self.progress = config, here, shutdown, progress
        self.began = time.monotonic()
        self.folder = RunFolder(config.folder)
        self.samples = here.world * config.loop.batch_size * config.loop.grad_accumulation
        adapter = load_adapter(config.model)
        self.grids = preflight.check_settings(config, adapter, here.world)
        found = checkpoints.choose(self.folder.checkpoints, resume)
        record = checkpoints.read_record(found) if found is not None else None
        if found is not None and record is not None:
            preflight.check_resumed(record, config, found, self.samples)
        self.prompts = preflight.open_prompts(config, adapter, here, self._embedding)
        fingerprint = preflight.prompts_fingerprint(self.prompts)
        if record is not None and record["prompts"] != fingerprint:
            raise ConfigError(
                f"{found} was made with other prompts than {config.embeddings}; put them back, or name another run"
            )
        self._fixed = {"config": config.model_dump(mode="json"), "samples": self.samples, "prompts": fingerprint}
        gc.collect()  # the text encoders
        self.state = TrainState(config, here)
        preflight.check_space(self.folder.checkpoints, self.state.tensors(), config.loop)
        self.adapter, self.roles = self.state.adapter, self.state.roles
        schedule = self.adapter.schedule(config.latent)
        self.matchings = {k: Matching(self.roles, schedule, grid, config.method) for k, grid in self.grids.items()}
        self.unconditional: Condition | None = None
        if config.method.cfg_scale != 1:
            negative = self.prompts.negative(config.loop.batch_size)
            self.unconditional = to_device(self.adapter.conditions(negative, config.latent), here.device)
        self.preview = Preview(config, self.adapter, self.prompts, here.device)
        self.step, self.saved, self.divergence = 0, found, Divergence()
        if found is not None:
            record = self.state.load(found)
            self.step, self.divergence = record["step"], Divergence(record["divergence"])
        self.tracker: Tracker | None = None

    def run(self) -> int:
        """Train to the end, or until something asks to stop. Returns the exit code."""
        if self.here.first:
            self.folder.open(self.config, self.step)
            self.tracker = open_tracker(self.config, self.folder.path / "tracker", self.step)
        self._greet()
        try:
            code = self._loop()
        finally:
            self.shutdown.deferred = False
            self.folder.close()
            if self.tracker is not None:
                self.tracker.close()
        if self.step >= self.config.loop.max_steps:
            self._export()
        return code

    def _loop(self) -> int:
        loop = self.config.loop
        self.shutdown.deferred = True
        self.progress.skip()
        while self.step < loop.max_steps:
            numbers = self._step()
            self.step += 1
            self._log(numbers)
            stop = self._stop()
            if stop or self.step % loop.checkpoint_every == 0 or self.step == loop.max_steps:
                self._save()
            if loop.sample_every and self.step % loop.sample_every == 0 and not stop:
                self._sample()
            if stop and self.step < loop.max_steps:
                self.progress.say(
                    f"stopped {stop} after step {self.step} of {loop.max_steps}, which is not the end; checkpoint "
                    f"{self.saved}; the same command goes on from there"
                )
                return self.shutdown.exit_code
            self.progress.skip()
        return 0

    def _step(self) -> dict[str, float]:
        """Roll out, update the critic, then the student, then the average."""
        method, seed = self.config.method, self.config.seed
        self.roles.set_step(self.step)
        matching = self.matchings[choice(method.all_steps, seed, self.step, "K")]
        passes = [self._pass(matching, number) for number in range(self.config.loop.grad_accumulation)]
        critic = []
        for update in range(method.critic_updates):
            losses = [partial(matching.critic_loss, p.rolled, p.condition, p.draws, update) for p in passes]
            critic.append(self._update("critic", losses))
        loss_of = matching.regression_loss if self.step < method.regression_updates else matching.student_loss
        losses = [partial(loss_of, p.rolled, p.condition, self.unconditional, p.draws) for p in passes]
        student = self._update("student", losses)
        self.roles.update_average(self.step)
        means = [sum(values) / len(critic) for values in zip(*critic)]
        numbers = {"loss/critic": means[0], "loss/student": student[0]}
        numbers |= {"grad_norm/critic": means[1], "grad_norm/student": student[1]}
        self._check(self.divergence.find(numbers), numbers)
        return numbers | {"steps": matching.grid.steps}

    def _pass(self, matching: Matching, number: int) -> _Pass:
        """Conditions and roll-out of one pass: its samples are these of all ranks' and passes'."""
        batch = self.config.loop.batch_size
        first = (number * self.here.world + self.here.rank) * batch
        samples = range(first, first + batch)
        seed, device = self.config.seed, self.here.device
        rows = [prompt_of(seed, len(self.prompts), self.step * self.samples + i) for i in samples]
        condition = to_device(self.adapter.conditions(self.prompts.batch(rows), self.config.latent), device)
        draws = Draws(seed, self.step, samples, device)
        start = draws.normal(self.adapter.latent_shape(self.config.latent, batch)[1:], "start")
        return _Pass(draws, condition, matching.roll_out(start, condition, draws))

    def _update(self, role: Role, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """One update of a role; its loss (mean over all samples of all ranks) and gradient norm before clipping."""
        total = 0.0
        for loss_of in losses:
            loss = loss_of() / self.config.loop.grad_accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = self.state.optimizers[role].update(self.step)  # nothing is updated where it is no finite number
        (mean,) = self.here.mean([total])
        numbers = {f"loss/{role}": mean, f"grad_norm/{role}": norm}
        bad = next((f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)), None)
        self._check(bad, numbers)
        return mean, norm

    def _check(self, bad: str | None, numbers: Mapping[str, float]) -> None:
        """Raise ``DivergedError`` where something is bad."""
        if bad is None:
            return
        said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        rates = ", ".join(f"{role} {self.state.rate(role, self.step):.3g}" for role in TRAINED)
        raise DivergedError(
            f"diverged at step {self.step + 1}: {bad} ({said}; learning rates: {rates}). The last good checkpoint is "
            f"{self.saved or 'none: it was before the first'}. Lower optimizer.student.learning_rate or "
            "optimizer.critic.learning_rate, raise warmup_steps, or lower method.cfg_scale; start under another name"
        )

    def _log(self, numbers: Mapping[str, float]) -> None:
        seconds = self.progress.took()
        if self.step % self.config.loop.log_every and self.step != self.config.loop.max_steps:
            return
        sparsity = self.roles.sparsity()
        whole: dict[str, float] = {"step": self.step, **numbers}
        whole |= {f"learning_rate/{role}": self.state.rate(role, self.step - 1) for role in TRAINED}
        if sparsity["sparsity"] is not None:
            whole["sparsity"] = sparsity["sparsity"]
        whole |= {"seconds": round(seconds, 4), "samples_per_second": round(self.samples / max(seconds, 1e-9), 4)}
        if self.here.device.type == "cuda":
            whole["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if self.here.first:
            self.folder.log(whole)
            if self.tracker is not None:
                self.tracker.log(self.step, {name: value for name, value in whole.items() if name != "step"})
            self.progress.show(self.step, whole)

    def _stop(self) -> str:
        """Why to stop now, the same on all ranks; empty: go on."""
        minutes = self.config.loop.stop_after_minutes
        over = minutes is not None and time.monotonic() - self.began > minutes * 60
        code = int(self.here.highest(float(self.shutdown.received or (_TIME_IS_UP if over else 0))))
        if code == _TIME_IS_UP:
            return "by loop.stop_after_minutes"
        if code:
            self.shutdown.received = signal.Signals(code)
        return f"by {signal.Signals(code).name}" if code else ""

    def _save(self) -> None:
        if self.here.highest(float(not self.state.all_finite())):
            self._check("a weight is no finite number", {})
        record = {**self._fixed, "divergence": self.divergence.state()}
        keep = self.config.loop.keep_last
        where = self.folder.checkpoints
        self.saved = checkpoints.save(where, self.step, self.state.tensors(), record, keep_last=keep)

    def _sample(self) -> None:
        if not self.preview.possible:
            return
        with self.roles.averaged():
            latents = self.preview.make(self.matchings[self.config.method.steps])
        if self.here.first:
            self.preview.write(latents, self.folder.samples(self.step))
        self.here.wait()

    def _export(self) -> None:
        if self.folder.export.exists():
            self.progress.say(
                f"{self.folder.export} is there and was left as it is; blade-distill export writes another"
            )
            return
        self.state.export(self.folder.export, self.grids)
        self.here.wait()
        self.progress.say(f"done: {self.step} steps; the student is in {self.folder.export}")

    def _greet(self) -> None:
        config = self.config
        start = f"from step {self.step}, {self.saved}" if self.saved else "from the start"
        ks = ", ".join(map(str, config.method.all_steps))
        self.progress.say(
            f"{config.name}: {start}; K = {ks}; {len(self.prompts)} prompts; {self.samples} samples per update; "
            f"{config.guidance}"
        )

    def _embedding(self, done: int, total: int) -> None:
        if total:
            self.progress.say(f"embedding prompts: {done} of {total}")


def export_run(run: Path, *, out: Path, step: int | None = None, merge: bool = False) -> Path:
    """Export the student of a run's checkpoint.

    Args:
        run: folder of the run.
        out: folder of the export; must not hold anything yet.
        step: of the checkpoint; None: the last whole one.
        merge: add LoRA to the weights instead of exporting it by itself.

    Returns:
        ``out``.

    Raises:
        ConfigError: there is no such run or checkpoint, or ``out`` holds files.
        DataError: the checkpoint is damaged.
    """
    folder = RunFolder(run)
    config = folder.config()
    check_target(out)
    with ranks() as here:
        named = "auto" if step is None else str(folder.checkpoints / f"step_{step:08d}")
        found = checkpoints.choose(folder.checkpoints, named)
        if found is None:
            raise ConfigError(f"{run} has no checkpoint; start it: blade-distill train --config {run}/config.yaml")
        state = TrainState(config, here, train=False)
        state.load(found)
        grids = {k: state.adapter.grid(config.latent, k) for k in config.method.all_steps}
        state.export(out, grids, merge=merge)
        here.wait()
    return out
