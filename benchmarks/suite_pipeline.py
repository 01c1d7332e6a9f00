"""Suite ``pipeline``: a whole generation through diffusers' Wan pipeline, from the prompt to the frames.

Text encoder and VAE are part of every figure. They have the published sizes where a GPU has room for them, and are tiny
elsewhere, so that on a CPU the transformer's share is larger than a user's would be; the rows say which. All weights
are random, and the tokenizer knows the words of its prompt only.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sdpa
from benchmarks.demo import default_dtype
from benchmarks.models import MODELS, Model, Size
from benchmarks.registry import Arm, Case, Plan, suite
from benchmarks.split import time_parts
from benchmarks.suite_models import (
    BASELINE,
    DENSE_WITNESS,
    EVERY_BLOCK,
    StepGate,
    about,
    best_sdpa,
    compiled_for_sure,
    every_block,
    separately,
    sparse_arm,
    witness,
    witness_of,
)

MODEL = "wan2.1-1.3b"
PROMPT, NEGATIVE, CFG_SCALE = "a red fox runs through the snow", "blurred", 5.0
ROOM = 60 * 2**30  # bytes of a GPU's memory from which the published text encoder stays beside the transformer
TINY_TEXT = {"d_model": 4096, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
UMT5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
# Compresses as the published one does, 4 x 8 x 8, but handles pixels in patches of 2 x 2: decoding takes seconds.
TINY_VAE = {
    "base_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True], "in_channels": 12,
    "out_channels": 12, "patch_size": 2,
}  # fmt: skip
SPARSE, OPTIONS = "blade asa, sparsity 0.8", {"sparsity": 0.8, "when": "always"}


@suite("pipeline")
def cases(plan: Plan) -> Iterator[Case]:
    """One generation by `WanPipeline` with guidance: 8 steps on a GPU, 4 of a scaled model on a CPU."""
    yield pipeline_case(MODELS[MODEL], plan, steps=8 if plan.device.type == "cuda" else 4)


def pipeline_case(model: Model, plan: Plan, steps: int) -> Case:
    """Compiled dense first: it is the baseline."""
    large = published_parts(plan.device)
    columns = about(model, plan) | {
        "steps": steps,
        "cfg_scale": CFG_SCALE,
        "text_encoder": "published size (UMT5-XXL)" if large else "tiny",
        "vae": "published size" if large else "tiny",
    }
    return Case(f"{model.name}, {steps} steps with guidance", lambda: _arms(model, plan, steps), columns)


def published_parts(device: torch.device) -> bool:
    """Whether text encoder and VAE run in their published sizes."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= ROOM


@dataclass(frozen=True)
class Pipelines:
    """Pipelines that share text encoder, VAE and the transformer's weights."""

    transformer: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    size: Size
    steps: int
    seed: int

    def generation(
        self, backend: str | None = None, options: dict[str, Any] | None = None, dense: str = "default"
    ) -> Run:
        """One with the transformer compiled by a backend; None: eager."""
        import diffusers

        transformer = deepcopy(self.transformer, {id(t): t for t in self.transformer.parameters()})
        if backend is not None:
            transformer.compile(backend=backend, options=options, **separately())
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipe = diffusers.WanPipeline(tokenizer(), self.text_encoder, self.vae, scheduler, transformer)
        pipe.set_progress_bar_config(disable=True)
        return Run(pipe, self.size, self.steps, self.seed, dense)


@dataclass(frozen=True)
class Run:
    """A generation, ready to be called."""

    pipe: Any
    size: Size
    steps: int
    seed: int
    dense: str
    "the backend of dense SDPA"

    def __call__(self) -> Tensor:
        frames, height, width = self.size.latent
        with sdpa.preferring(self.dense)():
            done = self.pipe(
                PROMPT,
                NEGATIVE,
                height=8 * height,
                width=8 * width,
                num_frames=4 * frames - 3,
                num_inference_steps=self.steps,
                guidance_scale=CFG_SCALE,
                generator=torch.Generator().manual_seed(self.seed),
                output_type="pt",
                max_sequence_length=self.size.text,
            )
        out: Tensor = done.frames
        return out

    def parts(self, device: torch.device) -> dict[str, Any]:
        """Seconds of text encoder, transformer and VAE in one more generation, and of the rest."""
        model = self.pipe.transformer
        named = {
            "text encoder": (self.pipe.text_encoder, "forward"),
            "transformer": (model, "_compiled_call_impl" if model._compiled_call_impl else "forward"),
            "VAE": (self.pipe.vae, "decode"),
        }
        return {"split": time_parts(self, named, device)}


def pipelines(model: Model, plan: Plan, steps: int, dtype: torch.dtype) -> Pipelines:
    """The parts on the plan's device, rounded to the device's dtype, then in ``dtype``."""
    import diffusers
    import transformers

    large, size, native = published_parts(plan.device), model.size(plan.device), default_dtype(plan.device.type)
    transformer = model.build(size, native, plan.device, plan.seed)
    text = transformers.UMT5Config(**(UMT5_XXL if large else TINY_TEXT))
    torch.manual_seed(plan.seed)
    with torch.device(plan.device):
        vae = diffusers.AutoencoderKLWan(**({} if large else TINY_VAE))
        encoder = transformers.UMT5EncoderModel(text)
    parts = [part.to(native).to(dtype).eval().requires_grad_(False) for part in (encoder, vae)]
    if dtype == torch.float32:
        transformer = transformer.float()
    return Pipelines(transformer, *parts, size, steps, plan.seed)


def tokenizer() -> Any:
    """Words to numbers, as the pipeline calls it."""
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *f"{PROMPT} {NEGATIVE}".split()])}
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", unk_token="<unk>")


def _arms(model: Model, plan: Plan, steps: int) -> list[Arm]:
    dtype = default_dtype(plan.device.type)
    proofs = witnesses(model, plan)
    exact = pipelines(model, plan, steps, torch.float32)
    # Steps add up; frames of another seed are 0.13 away.
    gate = StepGate(exact.generation()(), rounding=2000, most=0.1)
    del exact
    run = pipelines(model, plan, steps, dtype)
    best = best_sdpa(model, plan)
    made = {
        BASELINE: run.generation("inductor", dense=best),
        "eager dense": run.generation(dense=best),
        EVERY_BLOCK: run.generation("blade", every_block(OPTIONS)),
        SPARSE: run.generation("blade", OPTIONS),
    }
    calls = {name: compiled_for_sure(each) for name, each in made.items()}
    parts = {name: lambda each=each: each.parts(plan.device) for name, each in made.items()}
    about = {"sdpa": best}
    return [
        Arm(BASELINE, calls[BASELINE], gate.baseline, None, about, DENSE_WITNESS, parts[BASELINE]),
        Arm("eager dense", calls["eager dense"], gate.as_near, None, about, after=parts["eager dense"]),
        Arm(EVERY_BLOCK, calls[EVERY_BLOCK], gate.as_near, certified_by=witness_of(SPARSE), timed=False),
        sparse_arm(SPARSE, calls[SPARSE], gate.distance, OPTIONS, EVERY_BLOCK, parts[SPARSE]),
        *proofs,
    ]


def witnesses(model: Model, plan: Plan) -> list[Arm]:
    """Arms that are only checked: one step in fp32 of a shallow transformer, see `suite_models.witnesses`."""
    run = pipelines(model.shallow(), plan, 1, torch.float32)
    gate = StepGate(run.generation()(), rounding=400)
    dense, every = run.generation("inductor"), run.generation("blade", every_block(OPTIONS))
    arms = [
        witness(DENSE_WITNESS, compiled_for_sure(dense), gate.baseline),
        witness(witness_of(SPARSE), compiled_for_sure(every), gate.as_near, blade=True),
    ]
    torch._dynamo.reset()
    return arms
