"""What the code of the pages runs on where the hub and a GPU are out of reach.

- ``from_pretrained`` of pipelines and transformers gives those of `examples/tiny.py`, which are called at tiny sizes.
- ``.to("cuda")`` stays on the CPU; ``enable_model_cpu_offload`` attaches its hook with the CPU as the device to run on.
- ``load_lora_weights`` of a path that isn't there adds a random adapter; of one that is, it loads it.
- Inductor runs all of its passes and then the graph itself, instead of generating code: that costs seconds a graph and
  is what the backend's own tests do.
- ``student`` in the working directory is an export of a tiny student, made by the package's own function.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook

from blade_compile.distill.export import export
from blade_compile.distill.grids import flow_grid
from blade_compile.distill.schedules import schedule_of

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
VIDEO = {"num_frames": 5, "height": 64, "width": 64}
SIZES = {"wan": VIDEO, "cogvideox": VIDEO, "flux": {"height": 64, "width": 64}}
PIPELINES = {"WanPipeline": "wan", "CogVideoXPipeline": "cogvideox", "FluxPipeline": "flux"}
LORA = {"r": 2, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put the stand-ins in place, with ``folder`` as the working directory."""
    patch.syspath_prepend(str(EXAMPLES))
    patch.chdir(folder)
    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(_pipeline))
    patch.setattr(diffusers.WanTransformer3DModel, "from_pretrained", classmethod(_transformer))
    patch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *args, **kwargs: pipe)
    patch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", _offload)
    for cls in (diffusers.WanPipeline, diffusers.FluxPipeline):
        patch.setattr(cls, "load_lora_weights", functools.partialmethod(_lora, cls.load_lora_weights))
    without_code_generation(patch)


def without_code_generation(patch: pytest.MonkeyPatch) -> None:
    """Inductor up to its last graph, which then runs as it is."""
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx

    def run_the_graph(gm: torch.fx.GraphModule, example_inputs: object, **how: object) -> Any:
        return make_boxed_func(gm.forward)

    patch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=run_the_graph))


def student(folder: Path) -> None:
    """An export with a LoRA, as ``blade-distill export`` leaves it."""
    import tiny
    from peft import LoraConfig

    model = tiny.wan_transformer()
    model.add_adapter(LoraConfig(**LORA))
    scheduler = dict(diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLOW).config)
    config = {"model": {"path": "some/base"}, "method": {"steps": 4}, "sparsity": {"sparsity": 0.5, "block_size": 16}}
    grid = flow_grid(schedule_of(scheduler), 4)
    export(model, folder, family="wan", grid=grid, config=config, scheduler_config=scheduler)


def _pipeline(cls: type, name: str, **options: Any) -> Any:
    import tiny

    kind = PIPELINES[cls.__name__]
    made = getattr(tiny, kind)()
    small = {**SIZES[kind], "max_sequence_length": tiny.TEXT}

    def call(pipe: Any, *args: Any, num_inference_steps: int = 2, **given: Any) -> Any:
        return cls.__call__(pipe, *args, num_inference_steps=num_inference_steps, **{**given, **small})

    made.__class__ = type(f"Tiny{cls.__name__}", (cls,), {"__call__": call})
    return made


def _transformer(cls: type, name: str, **options: Any) -> Any:
    import tiny

    return tiny.wan_transformer()


def _offload(pipe: Any) -> None:
    cpu_offload_with_hook(pipe.transformer, execution_device=torch.device("cpu"))


def _lora(pipe: Any, load: Any, source: Any, **options: Any) -> None:
    from peft import LoraConfig

    if Path(source).exists():
        load(pipe, source, **options)
    else:
        pipe.transformer.add_adapter(LoraConfig(**LORA))
