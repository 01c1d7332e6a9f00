"""Inductor's CUDA code without a CUDA device: the code is generated and kept, never run.

    with pretend_cuda():
        code = inference_code(Model, lambda: [torch.empty(...)], "blade", {"when": "always"})

torch is told that an H200 is there, as far as generating code asks; tensors are fake ones on "cuda", and compilation
ends where the generated module would be loaded. It changes torch for the process, so it is used in processes of their
own, and without ``TRITON_INTERPRET``, under which Triton has no compiler. The names replaced are private ones of torch:
a new torch may ask for another.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=60 << 20,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    gcnArchName="",
    is_integrated=0,
    uuid="none",
)


class _Driver:
    """What Triton asks its driver while Inductor writes code for an H200."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @property
    def utils(self) -> Any:
        raise AssertionError("a kernel is being loaded: nothing runs here")


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Objects, names, and what they answer on a machine with one H200."""
    import torch.cuda.random
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_device_name": H200.name,
        "is_bf16_supported": True,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    yield from ((torch.cuda, name, answer(value)) for name, value in answers.items())
    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
        yield module, "set_rng_state", answer(None)
    for name in ("_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        yield torch._C, name, answer(0)
    yield torch.version, "cuda", "13.0"
    interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "memory_allocated": 0,
        "synchronize": None,
        "current_stream": 0,
    }
    yield from ((CudaInterface, name, staticmethod(answer(value))) for name, value in interface.items())
    yield CudaInterface.Worker, "get_device_properties", staticmethod(answer(H200))
    yield CudaInterface.Worker, "current_device", staticmethod(answer(0))
    # These make real CUDA tensors to trace Inductor's own patterns, which have no part in this.
    yield joint_graph, "lazy_init", answer(None)
    yield post_grad, "lazy_init", answer(None)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """An H200 for Inductor's code generation; tensors on "cuda" have to be fake."""
    from triton.runtime.driver import driver

    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        driver.set_active(_Driver())
        yield


class _Written(Exception):
    """The code is written; nothing is left to do."""


@contextlib.contextmanager
def _written_modules() -> Iterator[list[str]]:
    """The modules that Inductor would load, as far as it gets; then `_Written` ends the compilation."""
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []

    def keep(graph: GraphLowering, *args: Any, **kwargs: Any) -> Any:
        codes.append(graph.codegen()[0].value)
        raise _Written

    with mock.patch.object(GraphLowering, "compile_to_module", keep):
        try:
            yield codes
        except Exception as error:
            if "_Written" not in repr(error):
                raise


def inference_code(
    build: Callable[[], nn.Module], inputs: Callable[[], list[torch.Tensor]], backend: str, options: dict[str, Any]
) -> str:
    """The module of a model's forward. ``build`` runs on the meta device, ``inputs`` under a fake mode on CUDA."""
    torch._dynamo.reset()
    with torch.device("meta"):  # a fake CUDA tensor can't be filled at random, as layers do
        model = build().eval()
    with FakeTensorMode(), torch.device("cuda"):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        args = inputs()
    with _written_modules() as codes, torch.no_grad():
        torch.compile(model, backend=backend, options={"compile_threads": 1, **options})(*args)
    return codes[0]


def training_code(
    build: Callable[[], nn.Module], inputs: Callable[[], list[torch.Tensor]], patches: dict[str, Any]
) -> list[str]:
    """The modules of forward and backward.

    A CPU build of torch can't differentiate CUDA tensors, not even fake ones: the graphs are made for the CPU, and
    moved to CUDA when forward and backward are handed to Inductor's compiler one by one.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    torch._dynamo.reset()
    graphs: list[str] = []

    def run(*args: Any) -> Any:
        raise _Written

    def on_cuda(gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        with _written_modules() as codes, torch.no_grad():
            compile_fx_inner(*_moved(gm, example_inputs), **kwargs)
        graphs.append(codes[0])
        return run

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=on_cuda, config_patches={"compile_threads": 1, **patches})

    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True), _written_modules():
        torch.compile(build().train(), backend=backend)(*inputs())
    return graphs


def _moved(gm: fx.GraphModule, example_inputs: list[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph and its inputs on CUDA instead of the CPU."""
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = detect_fake_mode(example_inputs)
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda", 0))
    with mode:
        moved = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, torch.Tensor)
            else x
            for x in example_inputs
        ]
    FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(*moved)
    gm.recompile()
    return gm, moved


# --- what tests/test_generated_cuda.py looks at ----------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block with rotated queries and keys; its attention is SDPA, or what that becomes on an H200.

    A CPU build of torch takes CUDA's SDPA apart into matrix products, so that plain Inductor gets the operator itself.
    """

    def __init__(self, attention: str, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.attention == "flash":
            attended = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        else:
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def compiled_kernel(code: str) -> dict[str, int]:
    """Compile the one kernel in a generated module that Inductor did not write: what it says is all that it needs."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget

    definitions = re.findall(r"async_compile\.triton\('(\w+)', '{3}(.*?)'{3}", code, re.DOTALL)
    ((name, text),) = [(name, text) for name, text in definitions if "user_autotune" in text]
    tuner = getattr(PyCodeCache.load(text), name)
    names, meta = tuner.fn.arg_names, tuner.triton_meta
    constants = {(names.index(argument),): value for argument, value in meta["constants"].items()}
    source = triton.compiler.ASTSource(
        fn=tuner.fn, signature=meta["signature"], constexprs=constants, attrs=meta["configs"][0]
    )
    options = {"num_warps": tuner.configs[0].num_warps, "num_stages": tuner.configs[0].num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"shared": made.metadata.shared, "wgmma": made.asm["ptx"].count("wgmma.mma_async")}


def main(path: str) -> None:
    """Write the generated modules of all variants as JSON."""
    from blade_compile.backend import inductor_options

    sparse = {"when": "always", "sparsity": 0.8}
    inlined = {**sparse, "inline_kernels": True}

    def flash() -> nn.Module:
        return Block("flash").bfloat16()

    def sdpa() -> nn.Module:
        return Block("sdpa").bfloat16()

    def inputs() -> list[torch.Tensor]:
        return [torch.empty(1, 1000, 256, dtype=torch.bfloat16)]

    with pretend_cuda():
        codes = {
            "plain": [inference_code(flash, inputs, "inductor", {})],
            "opaque": [inference_code(sdpa, inputs, "blade", sparse)],
            "inlined": [inference_code(sdpa, inputs, "blade", inlined)],
            "plain training": training_code(flash, inputs, {}),
            "opaque training": training_code(sdpa, inputs, inductor_options(sparse)),
            "inlined training": training_code(sdpa, inputs, inductor_options(inlined)),
        }
        compiled = compiled_kernel(codes["inlined"][0])
    Path(path).write_text(json.dumps({"codes": codes, "compiled": compiled}))


if __name__ == "__main__":
    main(sys.argv[1])
