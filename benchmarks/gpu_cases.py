"""What `benchmarks.gpu` times: the calls, checked before they are timed, and one row for each sparsity."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_problem import DTYPE, Problem, Shape, exact_rows, sampled_error
from blade_compile.kernels import reference

# Relative L2 error of sampled rows against fp64: a wrong mask, scale or tail is off by far more than bf16 is.
LIMIT = 2e-2
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
BACKWARD_FLOPS = 2.5  # five products for the forward's two
Row = dict[str, Any]
Cases = dict[str, timing.Case]
Measure = Callable[[Cases], dict[str, timing.Timing]]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_call(p: Problem, sparsity: float, *inputs: Tensor) -> Callable[[], Tensor]:
    """Compiled FlexAttention."""
    mask, options = p.flex_mask(sparsity), flex_options(p.shape.block)
    q, k, v = inputs or (p.q, p.k, p.v)
    return lambda: _compiled_flex()(q, k, v, block_mask=mask, kernel_options=options)


def flex_options(block: int) -> dict[str, int] | None:
    """FlexAttention's tiles on a GPU must divide the block, which its defaults don't do for blocks of 64."""
    sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    return dict.fromkeys(sizes, 64) if block == 64 else None


@contextmanager
def _only(backend: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, BACKENDS[backend])]):
        yield


def dense_call(backend: str, *inputs: Tensor) -> Callable[[], Tensor]:
    """Dense SDPA by one backend."""

    def run() -> Tensor:
        with _only(backend):
            return F.scaled_dot_product_attention(*inputs)

    return run


def usable(cases: Cases) -> tuple[Cases, dict[str, str]]:
    """The cases that run here, and why the others don't. A first call also compiles."""
    found, refused = {}, {}
    for name, case in cases.items():
        try:
            case()
            found[name] = case
        except Exception as error:  # noqa: BLE001 (whatever another library raises for what it can't run)
            refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    return found, refused


# --- rows ------------------------------------------------------------------------------------------------------------


def forward_rows(shape: Shape, measure: Measure, device: str = "cuda", dtype: torch.dtype = DTYPE) -> list[Row]:
    """One row for each sparsity: attention, prediction, selection and the whole op beside dense and FlexAttention."""
    p = Problem(shape, device, dtype)
    dense = {f"dense {b}": dense_call(b, p.q, p.k, p.v) for b in BACKENDS}
    cases: Cases = dict(dense)
    for s in p.lists:
        cases[f"attend {s}"] = lambda s=s: p.attend(s)[0]
        if shape.kept is None:
            op = functools.partial(torch.ops.blade.sparse_sdpa, p.q, p.k, p.v, sparsity=s, block_size=shape.block)
            cases[f"op {s}"] = op
            cases[f"predict {s}"] = functools.partial(p._predicted, s)
            cases[f"select {s}"] = selection(p, s)
        if s > 0:
            cases[f"flex {s}"] = flex_call(p, s)
    cases, refused = usable(cases)
    errors = {f"{what} {s}": sampled_error(p, s, cases[f"{what} {s}"]()) for s in p.lists for what in _made(cases, s)}
    wrong = {name: e for name, e in errors.items() if not e <= LIMIT}
    if wrong:
        raise AssertionError(f"{shape.name}: errors of sampled rows above {LIMIT}: {wrong}")
    times = measure(cases)
    best = _best(times, "dense ")
    baseline = sampled_error(p, None, cases[best]())
    return [_forward_row(p, s, times, best, errors, baseline, refused) for s in p.lists]


def _made(cases: Cases, s: float) -> list[str]:
    return [what for what in ("attend", "flex", "op") if f"{what} {s}" in cases]


def selection(p: Problem, sparsity: float) -> timing.Case:
    """Selection alone, from a block map already made."""
    block_map = torch.rand(1, p.shape.H, p.shape.blocks, p.shape.blocks, device=p.q.device)
    select = reference.select_blocks
    if p.q.is_cuda:
        from blade_compile.kernels import triton_select

        select = triton_select.select
    return lambda: select(block_map, sparsity, 0.95, 0.05, 1.0, None, None)


def _best(times: dict[str, timing.Timing], prefix: str) -> str:
    return min((name for name in times if name.startswith(prefix)), key=lambda name: times[name].median)


def _ms(times: dict[str, timing.Timing], name: str) -> float | None:
    return round(times[name].median * 1e3, 4) if name in times else None


def _forward_row(
    p: Problem,
    s: float,
    times: dict[str, timing.Timing],
    best: str,
    errors: dict[str, float],
    baseline: float,
    refused: dict[str, str],
) -> Row:
    row = _row(p, s, "forward", times, best, refused)
    if f"op {s}" in times:
        dense, op = times[best], times[f"op {s}"]
        predict = times[f"predict {s}"]
        row |= {
            "predict_ms": _ms(times, f"predict {s}"),
            "select_ms": _ms(times, f"select {s}"),
            "op_ms": _ms(times, f"op {s}"),
            "predict_share": round(predict.over(dense).median, 4),
            "op_speedup": dense.over(op).summary(3),
        }
    row["error"] = float(f"{max(errors[f'{w} {s}'] for w in ('attend', 'op') if f'{w} {s}' in errors):.1e}")
    row["dense_error"] = float(f"{baseline:.1e}")
    return row


def _row(
    p: Problem, s: float, direction: str, times: dict[str, timing.Timing], best: str, refused: dict[str, str]
) -> Row:
    shape, factor = p.shape, 1.0 if direction == "forward" else BACKWARD_FLOPS
    attend, dense = times[f"attend {s}"], times[best]
    rate = factor * p.flops(s) / attend.median
    dense_rate = factor * shape.dense_flops / dense.median
    row: Row = {
        "shape": shape.name,
        "direction": direction,
        "dtype": str(p.q.dtype).removeprefix("torch."),
        "S": shape.S,
        "H": shape.H,
        "D": shape.D,
        "block": shape.block,
        "sparsity": round(s, 4),
        "density": round(p.flops(s) / shape.dense_flops, 4),
        "dense_ms": {name.removeprefix("dense "): _ms(times, name) for name in times if name.startswith("dense ")},
        "best_dense": best.removeprefix("dense "),
        "dense_tflops": round(dense_rate * 1e-12, 1),
        "attend_ms": _ms(times, f"attend {s}"),
        "tflops": round(rate * 1e-12, 1),
        "dense_rate_share": round(rate / dense_rate, 4),
        "speedup": dense.over(attend).summary(3),
    }
    if f"flex {s}" in times:
        row["flex_ms"] = _ms(times, f"flex {s}")
        row["over_flex"] = times[f"flex {s}"].over(attend).summary(3)
    if refused:
        row["not_run"] = {name: why for name, why in refused.items() if not name.endswith(tuple("0123456789"))}
        row["not_run"] |= {name: why for name, why in refused.items() if name.endswith(f" {s}")}
    return row


def backward_rows(shape: Shape, measure: Measure, device: str = "cuda", dtype: torch.dtype = DTYPE) -> list[Row]:
    """One row for each sparsity: the backward operator alone beside the backward of dense SDPA and FlexAttention."""
    p = Problem(shape, device, dtype)
    inputs = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]

    def gradients(forward: Callable[[], Tensor]) -> timing.Case:
        """The backward pass alone of a forward that is run once, at the first call."""
        out: list[Tensor] = []

        def run() -> Any:
            with torch.enable_grad():
                if not out:
                    out.append(forward())
                return torch.autograd.grad(out[0], inputs, p.grad, retain_graph=True)

        return run

    cases: Cases = {f"dense {b}": gradients(dense_call(b, *inputs)) for b in BACKENDS}
    for s, (num, idx) in p.lists.items():
        out, lse = p.attend(s)
        saved = (p.grad, None, p.q, p.k, p.v, out, lse, num, idx)
        cases[f"attend {s}"] = functools.partial(
            torch.ops.blade.block_sparse_attention_backward, *saved, block_size=shape.block
        )
        if s > 0:
            cases[f"flex {s}"] = gradients(flex_call(p, s, *inputs))
    cases, refused = usable(cases)
    errors = _gradient_errors(p, cases)
    times = measure(cases)
    best = _best(times, "dense ")
    return [{**_row(p, s, "backward", times, best, refused), "error": errors.get(s)} for s in p.lists]


def _gradient_errors(p: Problem, cases: Cases) -> dict[float, float]:
    """Errors of dq of one query block against fp64, for each sparsity (dk and dv have their tests)."""
    head, row, scale = p.shape.H - 1, p.shape.blocks // 2, p.shape.D**-0.5
    found = {}
    for s, (num, idx) in p.lists.items():
        out, span = exact_rows(p, s, head, row)
        kept = idx[0, head, row, : int(num[0, head, row])].long()
        keys = (kept[:, None] * p.shape.block + torch.arange(p.shape.block, device=kept.device)).flatten()
        keys = keys[keys < p.shape.S]
        q, do = p.q[0, head, span].double(), p.grad[0, head, span].double()
        k, v = p.k[0, head, keys].double(), p.v[0, head, keys].double()
        weights = (q @ k.T * scale).softmax(-1)
        dq = weights * (do @ v.T - (do * out).sum(-1, keepdim=True)) @ k * scale
        error = float((cases[f"attend {s}"]()[0][0, head, span].double() - dq).norm() / dq.norm())
        if not error <= LIMIT:
            raise AssertionError(f"{p.shape.name}, sparsity {s}: dq is off by {error:.1e}, allowed {LIMIT}")
        found[s] = float(f"{error:.1e}")
    return found
