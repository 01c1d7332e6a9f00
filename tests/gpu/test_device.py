"""What only a device shows: streams, other devices, CUDA graphs, memory, and models that Inductor compiles for it.

The kernels' results are tested in `tests/kernels`, on the interpreter or on a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blade_compile  # noqa: F401 (registers the backend)
from blade_compile.kernels import accelerator, observe, ops, reference  # noqa: F401 (ops registers the operators)
from tests.tools import assert_close

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def inputs(S: int = 1000, H: int = 4, D: int = 64, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """q, k, v and a gradient [1, H, S, D], as slices of one projection."""
    made = torch.randn(1, S, 4, H, D, device=device).to(dtype)
    return made.permute(2, 0, 3, 1, 4).unbind(0)


def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=64)


def check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Against the reference on the lists that the same prediction gives."""
    num, idx = torch.ops.blade.mask_predict(q, k, sparsity=0.5, block_size=64)
    exact, plain = (
        reference.block_sparse_attention(*(x.to(dtype) for x in (q, k, v)), num, idx, None, 64)[0]
        for dtype in (torch.float64, q.dtype)
    )
    assert_close(out, exact, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_triton_runs_and_is_right(dtype: torch.dtype, D: int) -> None:
    q, k, v, _ = inputs(D=D, dtype=dtype)
    with observe.record() as events:
        out = sparse(q, k, v)
    assert {event.path for event in events} == {"triton"}
    check(q, k, v, out)


def test_it_runs_on_the_current_stream() -> None:
    q, k, v, _ = inputs()
    late = torch.empty_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever reads `late` on another stream reads it before it is written
        late.copy_(q)
        out = sparse(late, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(out, sparse(q, k, v), rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_a_device_that_is_not_current() -> None:
    q, k, v, grad = inputs(device="cuda:1")
    made = [x.detach().requires_grad_() for x in (q, k, v)]
    assert torch.cuda.current_device() == 0
    out = sparse(*made)
    grads = torch.autograd.grad(out, made, grad)
    assert all(x.device == q.device for x in (out, *grads))
    check(q, k, v, out.detach())


def test_a_cuda_graph_captures_forward_and_backward() -> None:
    q, k, v, grad = (x.clone() for x in inputs())

    def run() -> tuple[Tensor, ...]:
        num, idx = torch.ops.blade.mask_predict(q, k, tau=0.8, block_size=64)
        out, lse = torch.ops.blade.block_sparse_attention(q, k, v, num, idx, block_size=64)
        saved = (grad, None, q, k, v, out, lse, num, idx)
        return num, out, *torch.ops.blade.block_sparse_attention_backward(*saved, block_size=64)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x, new in zip((q, k, v, grad), inputs(), strict=True):
        x.copy_(new)
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_backward_repeats_itself_bit_by_bit() -> None:
    made = [x.detach().requires_grad_() for x in inputs(S=4000)[:3]]
    first, second = (torch.autograd.grad(sparse(*made).sum(), made) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def peak(run: Any) -> int:
    """Most bytes allocated while a call runs, beyond those before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def test_memory_stays_within_denses_and_the_stated_formula() -> None:
    S, H, D, block = 16_384, 8, 64, 128
    q, k, v, grad = inputs(S, H, D)
    made = [x.detach().requires_grad_() for x in (q, k, v)]
    nQ = S // block
    lists = 4 * H * nQ * (nQ + 1)

    def train(attention: Any) -> Any:
        return torch.autograd.grad(attention(*made), made, grad)

    def blade(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.blade.sparse_sdpa(q, k, v, sparsity=0.8, block_size=block)

    dense = nn.functional.scaled_dot_product_attention
    samples = 2 * 16 * H * nQ * D * 4  # the probe's sampled rows of q and k, at most fp32
    with torch.no_grad():
        assert peak(lambda: blade(q, k, v)) <= peak(lambda: dense(q, k, v)) + 3 * lists + samples + MIB
    # Training: the lists and their transpose, and two fp32 numbers (LSE, delta) for each query.
    assert peak(lambda: train(blade)) <= peak(lambda: train(dense)) + 4 * lists + samples + 8 * H * S + MIB


class Block(nn.Module):
    """A projection, attention, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def compiled(model: nn.Module, **options: Any) -> Any:
    settings = {"when": "always", "sparsity": 0.5, "block_size": 64, **options}
    return torch.compile(model, backend="blade", options=settings)


@pytest.mark.parametrize("inline", [False, True], ids=["operator", "inlined"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_equals_its_eager_self(mode: str, *, inline: bool) -> None:
    torch.manual_seed(0)
    model = Block().cuda().bfloat16()
    q_k_v = lambda x: (p.unflatten(-1, (4, 64)).transpose(1, 2) for p in model.qkv(x).chunk(3, -1))  # noqa: E731
    torch._dynamo.utils.counters.clear()
    run = compiled(model, mode=mode, inline_kernels=inline)
    with torch.no_grad():
        for _ in range(4):  # warm-up, recording, two replays
            x = torch.randn(1, 1000, 256, device="cuda", dtype=torch.bfloat16)
            expected = x + model.out(sparse(*q_k_v(x)).transpose(1, 2).flatten(2))
            torch.testing.assert_close(run(x).clone(), expected, rtol=2e-2, atol=2e-2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("inline", [False, True], ids=["operator", "inlined"])
def test_a_compiled_model_trains(*, inline: bool) -> None:
    torch.manual_seed(0)
    model = Block().cuda()
    x = torch.randn(1, 1000, 256, device="cuda")
    compiled(model, sparsity=0.0, inline_kernels=inline)(x).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-2, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
