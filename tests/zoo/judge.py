"""One row of the conformance table: compile an entry with Inductor and with blade, compare, and judge.

Three forward runs of blade are compared with plain Inductor: ``sparsity=0`` and ``tau=1`` keep every block and must
be as exact, ``sparsity=0.5`` must differ. The reference is the model in fp64, run eagerly.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import blade_compile
from blade_compile.kernels import observe
from tests.zoo.calls import AttentionCalls, Call
from tests.zoo.entry import Entry

Row = dict[str, Any]
Options = Mapping[str, Any]
ALWAYS: Options = {"when": "always", "block_size": 16, "min_tokens": 1}
SEED = 0


def judge(entry: Entry) -> Row:
    """The row of an entry. `problems` lists what is wrong; `outcome` is passed or failed."""
    start = time.perf_counter()
    row: Row = {"case": entry.name, "family": entry.family, "notes": entry.notes}
    problems: list[str] = []
    try:
        model = entry.build()
        calls = _eager_calls(entry, model)
        row["fullgraph"] = _compiles_whole(entry, model)
        if row["fullgraph"] != entry.fullgraph:
            problems.append(f"fullgraph with plain Inductor: {row['fullgraph']}, recorded {entry.fullgraph}")
        row["whole"] = row["fullgraph"] and not entry.breaks
        _sites(entry, model, calls, row, problems)
        _forward(entry, model, row, problems)
        if entry.backward and "inductor fails" not in row:
            _backward(entry, model, row, problems)
    except Exception as error:  # noqa: BLE001 (a row for every case: the table shows what failed)
        problems.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
    row |= {"problems": problems, "outcome": "failed" if problems else "passed"}
    row["seconds"] = round(time.perf_counter() - start)
    return row


# --- what there is, and what the report says about it -----------------------------------------------------------------


def _eager_calls(entry: Entry, model: nn.Module) -> list[Call]:
    with torch.no_grad(), AttentionCalls() as seen:
        _call(entry, model)
    return seen.calls


def required(entry: Entry, calls: list[Call]) -> int:
    """Calls that must be rewritten: self-attention, unmasked or with a mask on the keys, over up to 256 features."""
    square = [call for call in calls if call.square and call.head_dim <= 256 and call.form != "flex"]
    return sum(call.mask in {"none", "key", "unknown"} for call in square) - entry.not_self + entry.long_keys


def _sites(entry: Entry, model: nn.Module, calls: list[Call], row: Row, problems: list[str]) -> None:
    with torch.no_grad(), _fresh():
        args, kwargs = entry.inputs(SEED)
        options = {**ALWAYS, "sparsity": 0.5}
        compiled = torch.compile(model, backend="blade", options=options, fullgraph=row["whole"])
        report = blade_compile.explain(compiled, *args, **kwargs)
    codes = Counter[str]()
    for site in report.sites:
        codes[site.code] += site.calls
    rewritten = sum(site.calls for site in report.sites if site.rewritten)
    row |= {
        "calls": len(calls),
        "found": sum(codes.values()),
        "rewritten": rewritten,
        "refused": {code: codes[code] for code in sorted(codes) if code != "rewritten"},
        "density": min((site.density for site in report.sites if site.density is not None), default=1.0),
        "must": required(entry, calls) if entry.codes is None else entry.codes.count("rewritten"),
    }
    # Text and registers are protected, an image is not: of five blocks and more some must go at half the budget.
    whole = [
        site.name for site in report.sites if site.density == 1 and (site.shape[3] or 0) > 4 * ALWAYS["block_size"]
    ]
    if whole:
        problems.append(f"sparsity=0.5 drops nothing in {', '.join(whole)}")
    if entry.codes is not None:
        if sorted(codes.elements()) != sorted(entry.codes):
            problems.append(f"codes {sorted(codes.elements())}, expected {sorted(entry.codes)}")
    elif rewritten + codes["outside-graph"] != row["must"]:
        problems.append(f"{rewritten} rewritten, {row['must']} expected")


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(entry: Entry, model: nn.Module, row: Row, problems: list[str]) -> None:
    exact, row["reference"] = _exact(entry)
    try:
        dense, _ = _compiled(entry, model, "inductor", None, row["whole"])
    except Exception as error:  # noqa: BLE001 (Inductor's own limits, found by running it)
        _same_failure(entry, model, error, row, problems)
        return
    row["error"] = {"dense": _error(dense, exact)}
    for name, options in (("sparsity=0", {"sparsity": 0.0}), ("tau=1", {"tau": 1.0})):
        out, events = _compiled(entry, model, "blade", options, row["whole"])
        row["error"][name] = _error(out, exact)
        _compare(name, out, dense, exact, problems)
        row["kernel runs"] = _kernel_runs(events, "block_sparse_attention")
        if row["kernel runs"] != row["rewritten"]:
            problems.append(f"{name}: the block kernel ran {row['kernel runs']} times for {row['rewritten']} sites")
    if row["fullgraph"] and not row["whole"]:
        out, _ = _compiled(entry, model, "blade", {"sparsity": 0.0}, True)
        _compare("fullgraph=True", out, dense, exact, problems)
    out, _ = _compiled(entry, model, "blade", {"sparsity": 0.5}, row["whole"])
    row["change"] = _error(out, dense)
    if row["density"] < 1 and not row["change"] > 10 * max(row["error"]["dense"], torch.finfo(torch.float32).eps):
        problems.append(f"sparsity=0.5 changes the output by {row['change']:.1e} only")


def _same_failure(entry: Entry, model: nn.Module, error: Exception, row: Row, problems: list[str]) -> None:
    """Plain Inductor can't compile this on the CPU. Nothing may be claimed then, and blade must say the same."""
    reason = _headline(error)
    row["inductor fails"] = reason
    if row["rewritten"]:
        problems.append(f"sites are rewritten, but plain Inductor fails and nothing can be compared: {reason}")
    try:
        _compiled(entry, model, "blade", {"sparsity": 0.5}, row["whole"])
        problems.append(f"plain Inductor fails and blade does not: {reason}")
    except Exception as ours:  # noqa: BLE001
        if _headline(ours) != reason:
            problems.append(f"plain Inductor fails with {reason}, blade with {_headline(ours)}")


def _headline(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _compiles_whole(entry: Entry, model: nn.Module) -> bool:
    """Whether Dynamo takes the model in one graph. Inductor has no say in it, so the graph is run as it is."""
    try:
        with torch.no_grad(), _fresh():
            _call(entry, torch.compile(model, backend="eager", fullgraph=True))
    except Exception:  # noqa: BLE001 (any reason counts)
        return False
    return True


def _compiled(
    entry: Entry, model: nn.Module, backend: str, options: Options | None, fullgraph: bool
) -> tuple[list[Tensor], list[observe.Event]]:
    with torch.no_grad(), _fresh(), observe.record() as events:
        merged = {**ALWAYS, **options} if options is not None else None
        out = _call(entry, torch.compile(model, backend=backend, options=merged, fullgraph=fullgraph))
    return out, events


def _kernel_runs(events: list[observe.Event], op: str) -> int:
    return sum(event.op == op and event.path != "sdpa" for event in events)


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward(entry: Entry, model: nn.Module, row: Row, problems: list[str]) -> None:
    exact = _gradients(entry, entry.build().double(), lambda module: module, torch.float64)
    with _fresh():
        dense = _gradients(entry, model, lambda module: torch.compile(module, fullgraph=row["whole"]))
    with _fresh(), observe.record() as events:
        options = {**ALWAYS, "sparsity": 0.0}
        wrap = lambda module: torch.compile(module, backend="blade", options=options, fullgraph=row["whole"])  # noqa: E731
        blade = _gradients(entry, model, wrap)
    row["gradient error"] = {"dense": _error(dense, exact), "sparsity=0": _error(blade, exact)}
    runs = _kernel_runs(events, "block_sparse_attention_backward")
    if runs != row["rewritten"]:
        problems.append(f"backward: the block kernel ran {runs} times for {row['rewritten']} sites")
    if not _within_bound(blade, dense, exact):
        problems.append(f"backward: {row['gradient error']}")


def _gradients(
    entry: Entry, model: nn.Module, wrap: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Gradients of all parameters for one fixed random cotangent, as one flat tensor."""
    model.zero_grad(set_to_none=True)
    outputs = _call(entry, wrap(model), dtype)
    generator = torch.Generator().manual_seed(SEED)
    total = sum((out * torch.randn(out.shape, generator=generator).to(dtype)).sum() for out in outputs)
    assert isinstance(total, Tensor)
    total.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [torch.cat(grads)]


# --- shared -----------------------------------------------------------------------------------------------------------


def _exact(entry: Entry) -> tuple[list[Tensor], str]:
    """Outputs in fp64, and "fp64". Code that insists on fp32 is told otherwise; if that fails, fp32 stands in."""
    model = entry.build()
    with torch.no_grad():
        for promotion in (nullcontext(), _Promoted()):
            try:
                with promotion:
                    return _call(entry, model.double(), torch.float64), "fp64"
            except RuntimeError:
                continue
            finally:
                model.float()  # spellings share their modules with everyone
        return [out.double() for out in _call(entry, model)], "fp32"


class _Promoted(TorchFunctionMode):
    """Turns every wish for fp32 into fp64, for models that cast along the way."""

    _WIDER: ClassVar[dict[Any, torch.dtype]] = {torch.float32: torch.float64, torch.complex64: torch.complex128}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(self._wider, (args, kwargs or {}))
        out = func(*args, **kwargs)
        made = isinstance(out, Tensor) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return out.to(self._WIDER.get(out.dtype, out.dtype)) if made else out

    def _wider(self, value: Any) -> Any:
        return self._WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _call(entry: Entry, model: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The floating-point tensors that the model returns; inputs are made afresh, for models that write into them."""
    args, kwargs = entry.inputs(SEED)
    if dtype == torch.float64:
        args, kwargs = tree_map(_to_double, (args, kwargs))
    leaves = tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _to_double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _error(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """Relative L2 distance over all outputs, 0 where there is nothing to compare."""
    got, want = (torch.cat([out.double().flatten() for out in side]) for side in (outputs, exact))
    return float(f"{float((got - want).norm() / want.norm().clamp(min=1e-30)):.2e}")


def _within_bound(outputs: list[Tensor], dense: list[Tensor], exact: list[Tensor]) -> bool:
    """The tolerance policy over all values together: twice plain Inductor's error, and a rounding step as a floor."""
    step = max(torch.finfo(out.dtype).eps for out in outputs)
    return _error(outputs, exact) <= 2 * _error(dense, exact) + step


def _compare(name: str, outputs: list[Tensor], dense: list[Tensor], exact: list[Tensor], problems: list[str]) -> None:
    same = [(a.shape, a.dtype) for a in outputs] == [(a.shape, a.dtype) for a in dense]
    if not same:
        problems.append(f"{name}: shapes or dtypes differ from plain Inductor's")
    elif not _within_bound(outputs, dense, exact):
        problems.append(f"{name}: error {_error(outputs, exact)}, plain Inductor's {_error(dense, exact)}")


@contextmanager
def _fresh() -> Iterator[None]:
    """Nothing compiled before, same random state."""
    torch._dynamo.reset()
    torch.manual_seed(SEED)
    yield
