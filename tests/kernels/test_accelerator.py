"""Which implementation runs on an accelerator, and the whole operator path through the Triton kernels.

Without a GPU the CPU stands for one: dispatch is told to hand its calls over, and the interpreter runs the kernels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blade_compile import kernels
from blade_compile.kernels import accelerator, aten, dispatch, ops, reference  # noqa: F401 (registers the operators)
from tests.tools import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing launched, nothing broken, nothing loaded."""
    monkeypatch.setattr(accelerator, "_launched", False)
    monkeypatch.setattr(accelerator, "_broken", False)
    load = accelerator._launchers
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def any_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a chip that Triton has kernels for."""
    monkeypatch.setattr(accelerator, "_chip", lambda device: "cuda-sm90")


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch, any_chip: None) -> None:
    """Dispatch hands calls on the CPU to the accelerator, as it does on CUDA."""
    if DEVICE == "cuda":
        return
    stand_in = SimpleNamespace(
        select=lambda *args: accelerator.select(*args)[:2],
        attention_forward=lambda *args: accelerator.attention_forward(*args)[:2],
        attention_backward=accelerator.attention_backward,
    )
    monkeypatch.setattr(dispatch, "_kernel_runs", lambda q: False)
    monkeypatch.setattr(dispatch, "aten", stand_in)


def inputs(dtype: torch.dtype = torch.float32, D: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 2, 200, D] and k, v [1, 1, 150, D]: ragged, grouped."""
    made = [torch.randn(1, n, h, D).to(dtype).transpose(1, 2).to(DEVICE) for n, h in ((200, 2), (150, 1), (150, 1))]
    return made[0], made[1], made[2]


def launchers(**replaced: Any) -> SimpleNamespace:
    def never(*args: Any) -> None:
        raise AssertionError("not expected to be called")

    names = ("attention_forward", "attention_backward", "probe_map", "select")
    return SimpleNamespace(**{**dict.fromkeys(names, never), **replaced})


def lists_of(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    num = torch.full((1, 1, -(-q.shape[2] // 64)), 2, dtype=torch.int32, device=q.device)
    return num, torch.tensor([2, 0, 1], dtype=torch.int32, device=q.device).expand(1, 1, num.shape[2], 3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, str]:
    return accelerator.attention_forward(q, k, v, *lists_of(q, k), None, q.shape[-1] ** -0.5, 64)


def test_only_what_the_kernels_take_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_launchers", launchers)
    q = torch.empty(1, 1, 64, 32)
    assert not accelerator.runs_triton(q, 64)  # the CPU is no accelerator
    assert accelerator.family(q.device, q.dtype) == "accelerator-aten"
    monkeypatch.setattr(accelerator, "_chip", lambda device: "cuda-sm90")
    assert accelerator.runs_triton(q, 64) and accelerator.runs_triton(q.half(), 128)
    assert accelerator.family(q.device, torch.bfloat16) == "cuda-sm90"
    assert not accelerator.runs_triton(q, 32)
    assert not accelerator.runs_triton(q.double(), 64)
    assert accelerator.family(q.device, torch.float64) == "accelerator-aten"


@pytest.mark.parametrize(
    ("hip", "capability", "found"), [(None, (9, 0), "cuda-sm90"), (None, (7, 5), None), ("6.4", (9, 4), "hip-gfx942")]
)
def test_chips_by_name(
    hip: str | None, capability: tuple[int, int], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName="gfx942:sramecc+")
    )
    accelerator._chip_of.cache_clear()
    assert accelerator._chip(torch.device("cuda", 0)) == found
    accelerator._chip_of.cache_clear()


@pytest.mark.usefixtures("any_chip")
def test_without_triton_aten_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(kernels, "triton_forward", raising=False)  # where another test has loaded it
    monkeypatch.setitem(sys.modules, "blade_compile.kernels.triton_forward", None)
    q, k, v = inputs()
    with caplog.at_level(logging.WARNING, logger="blade_compile"):
        out, _, path = attend(q, k, v)
        attend(q, k, v)
    assert path == "aten"
    torch.testing.assert_close(out, aten.attention_forward(q, k, v, *lists_of(q, k), None, 0.25, 64)[0])
    assert [record.getMessage().split("(")[0] for record in caplog.records] == [
        "Triton is not available and the slower ATen path is used "
    ]


@pytest.mark.usefixtures("any_chip")
def test_a_triton_that_never_launched_is_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(accelerator, "_launchers", lambda: launchers(attention_forward=broken))
    with caplog.at_level(logging.WARNING, logger="blade_compile"):
        paths = [attend(*inputs())[2] for _ in range(2)]
    assert paths == ["aten", "aten"]
    assert [record.getMessage() for record in caplog.records] == [
        "Triton can't run here (RuntimeError: no C compiler): the slower ATen path is used."
    ]


@pytest.mark.usefixtures("any_chip")
def test_errors_of_a_working_triton_and_of_bad_lists_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [ValueError("kv_indices names block 99"), (1, 2), RuntimeError("launch failed")]

    def next_answer(*args: Any) -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(accelerator, "_launchers", lambda: launchers(attention_forward=next_answer))
    with pytest.raises(ValueError, match="names block 99"):
        attend(*inputs())
    assert attend(*inputs()) == (1, 2, "triton")
    with pytest.raises(RuntimeError, match="launch failed"):
        attend(*inputs())


@pytest.mark.usefixtures("handed_over")
@pytest.mark.parametrize("sparsity", [0.4, None], ids=["sparsity", "tau"])
def test_the_whole_operator_runs_on_the_kernels(sparsity: float | None) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    mask[:, 140:] = False
    how = {"sparsity": sparsity, "tau": 0.7, "block_size": 64, "protect_k": [0, 3]}
    num, idx = torch.ops.blade.mask_predict(q.detach(), k.detach(), mask, **how)
    bias, forced = dispatch.key_bias(mask, q.dtype), torch.tensor([True, False, False], device=DEVICE)
    chosen = (sparsity, 0.7, 0.05, 1.0, None, forced)
    expected = aten.select(q.detach(), k.detach(), bias, 0.25, 64, 16, 0, *chosen)
    torch.testing.assert_close(num, expected[0], rtol=0, atol=0)
    assert 0 < int(num.min()) and int(num.max()) <= 3

    out = torch.ops.blade.sparse_sdpa(q, k, v, mask, **how)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    assert accelerator._launched and not accelerator._broken
    exact, plain = (_reference(q, k, v, num, idx, mask, weights, dtype) for dtype in (torch.float64, torch.float32))
    for name, found, e, p in zip(("out", "dq", "dk", "dv"), (out, *grads), exact, plain, strict=True):
        assert_close(found, e, p, name)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, mask: Tensor, weights: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of the reference in a dtype."""
    made = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, _ = reference.block_sparse_attention(*made, num, idx, mask, 64, 0.25)
    return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), made)]
