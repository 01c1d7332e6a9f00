"""Suite ``ops``: one attention, dense, block-sparse and by others, on the same inputs and the same blocks.

Every sparse arm is checked against fp64 attention over the blocks that it kept (its error), so that only speed is
compared here; what leaving blocks out costs is the suite ``fidelity``'s subject. How far a result is from dense
attention stands beside it (its distance): all that is known of peers that choose blocks or quantise in their own way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blade_compile
from benchmarks import peers, sdpa
from benchmarks.attention_gate import Problem, backward_gate, exact_rows, forward_gate, relative
from benchmarks.cpu_attention import flex_call
from benchmarks.demo import default_dtype
from benchmarks.registry import Arm, Case, Plan, WrongResultError, suite
from benchmarks.split import kept, time_split
from blade_compile.config import BladeConfig
from blade_compile.kernels import ops as _ops  # noqa: F401 (registers the operators)
from blade_compile.kernels import selection

FULL: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": (2048, 4096, 8192, 16384), "heads": 2, "dtypes": (torch.float32, torch.bfloat16),
        "grid": (8, 32, 32),
    },
    "cuda": {
        "lengths": (4608, 17792, 32768, 75648), "heads": 12, "dtypes": (torch.bfloat16,), "grid": (32, 32, 32)
    },
}  # fmt: skip
DIMS, SPARSITIES, BLOCKS = (64, 128), (0.5, 0.8, 0.9), (64, 128)
POLICIES = ("asa", "asa_g", "adaspa", "vsa", "sparge", "xattention", "sta", "radial")
QUICK: dict[str, Any] = {"lengths": (2048, 4096), "dims": (128,), "sparsities": (0.8,), "blocks": (128,)}


@suite("ops")
def cases(plan: Plan) -> Iterator[Case]:
    """Prediction, selection and attention; forward at every size, backward at one sparsity."""
    full = FULL[plan.device.type]
    lengths, dims = (QUICK["lengths"], QUICK["dims"]) if plan.quick else (full["lengths"], DIMS)
    dtypes = (default_dtype(plan.device.type),) if plan.quick else full["dtypes"]
    for dtype, D, S in itertools.product(dtypes, dims, lengths):
        yield _forward(plan, dtype, full["heads"], S, D)
    if not plan.quick:
        for dtype, D in itertools.product(dtypes, dims):
            yield _backward(plan, dtype, full["heads"], lengths[-2], D)
        yield _policies(plan, dtypes[-1], full["heads"], full["grid"], dims[-1])


def inputs(plan: Plan, dtype: torch.dtype, H: int, S: int, D: int, count: int = 3) -> list[Tensor]:
    """Normal q, k, v (and more) [1, H, S, D]."""
    generator = torch.Generator().manual_seed(plan.seed)
    return [torch.randn(1, H, S, D, generator=generator).to(plan.device, dtype) for _ in range(count)]


def _about(kind: str, dtype: torch.dtype, H: int, S: int, D: int) -> dict[str, Any]:
    return {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "H": H, "S": S, "D": D}


def _name(kind: str, dtype: torch.dtype, S: int, D: int) -> str:
    return f"{kind} {str(dtype).removeprefix('torch.')} D={D} S={S}"


def _forward(plan: Plan, dtype: torch.dtype, H: int, S: int, D: int) -> Case:
    sparsities, blocks = (QUICK["sparsities"], QUICK["blocks"]) if plan.quick else (SPARSITIES, BLOCKS)

    def arms() -> list[Arm]:
        q, k, v = inputs(plan, dtype, H, S, D)
        full = _problem(q, k, v, 0.0, 128)
        made = [_dense(full)]
        for block, sparsity in itertools.product(blocks, sparsities):
            made += _sparse_arms(_problem(q, k, v, sparsity, block), sparsity, full)
        return made + [_peer(peer, call, full) for peer, call in peers.calls(q, k, v)]

    absent = peers.absent(plan.device)
    if plan.device.type == "cpu" and min(blocks) < 128:
        absent["FlexAttention, block 64"] = "its CPU template would be compiled once more for each"
    return Case(_name("forward", dtype, S, D), arms, _about("forward", dtype, H, S, D), absent)


def _dense(p: Problem) -> Arm:
    """The baseline: PyTorch's own attention, by its quickest kernel."""
    backend, attention = _quickest(p.q)
    about = {"density": 1.0, "flops": p.flops, "sdpa": backend}
    return Arm("dense", lambda: attention(p.q, p.k, p.v), gate(forward_gate(p, strict=False)), about=about)


def _quickest(q: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """The quickest dense kernel for queries like these: its name, and attention by it."""
    _, H, S, D = q.shape
    backend = sdpa.best(q.device, q.dtype, H, S, D)
    preferring = sdpa.preferring(backend)

    def attention(*inputs: Tensor) -> Tensor:
        with preferring():
            return F.scaled_dot_product_attention(*inputs)

    return backend, attention


def _peer(peer: peers.Peer, call: Callable[[], Tensor], full: Problem) -> Arm:
    about = {} if peer.density is None else {"density": round(peer.density(full.q), 4)}
    if peer.exact:
        return Arm(peer.name, call, gate(forward_gate(full, strict=False)), about={**about, "flops": full.flops})
    return Arm(peer.name, call, finite, about=about, after=_distance(full, call))


def _sparse_arms(p: Problem, sparsity: float, full: Problem) -> Iterator[Arm]:
    """The operator with prediction, its two parts, and FlexAttention on the same blocks."""
    density = p.kept_blocks / (p.q.shape[1] * p.num_blocks**2)
    label = f"sparsity {sparsity}, block {p.block}"
    about = {"sparsity": sparsity, "block": p.block, "density": round(density, 4), "flops": p.flops}
    name = f"blade asa, {label}"
    attend = torch.ops.blade.block_sparse_attention
    predict = {"sparsity": sparsity, "block_size": p.block}
    check = gate(forward_gate(p))
    whole = lambda: torch.ops.blade.sparse_sdpa(p.q, p.k, p.v, **predict)  # noqa: E731
    yield Arm(name, whole, check, about={**about, "policy": "asa"}, after=_distance(full, whole))
    yield Arm(
        f"{name}: prediction", lambda: torch.ops.blade.mask_predict(p.q, p.k, **predict), of=name,
        about={"part": "prediction"},
    )  # fmt: skip
    block_map = torch.rand(1, p.q.shape[1], p.num_blocks, p.num_blocks, device=p.q.device)
    yield Arm(
        f"{name}: selection alone", lambda: selection.select(block_map, sparsity), of=name, about={"part": "selection"}
    )
    yield Arm(
        f"{name}: attention",
        lambda: attend(p.q, p.k, p.v, p.num, p.idx, block_size=p.block)[0],
        check,
        of=name,
        about={**about, "part": "attention"},
    )
    if p.q.device.type == "cpu" and p.block < 128:
        return
    flex = flex_call(p)
    check = gate(forward_gate(p, strict=False))
    yield Arm(f"FlexAttention, {label}", flex, check, about=about, after=_distance(full, flex))


def _policies(plan: Plan, dtype: torch.dtype, H: int, grid: tuple[int, int, int], D: int) -> Case:
    """Every policy on one attention, as it is called directly: order, prediction, selection and attention."""
    S = math.prod(grid)

    def arms() -> list[Arm]:
        q, k, v = inputs(plan, dtype, H, S, D)
        full = _problem(q, k, v, 0.0, 128)
        made = [_dense(full)]
        for policy in POLICIES:
            made += _policy_arms(plan, full, policy, grid)
        return made

    about = _about("policies", dtype, H, S, D)
    return Case(f"policies {about['dtype']} D={D} S={S}", arms, about)


def _policy_arms(plan: Plan, full: Problem, policy: str, grid: tuple[int, int, int]) -> Iterator[Arm]:
    """A policy at each sparsity, and, not timed, with every block.

    A result is compared with fp64 on the blocks that the policy lists. Policies with an order or global tokens attend
    to something else than their lists say of the plain sequence: those rest on the arm that keeps every block.
    """
    q, k, v = full.q, full.k, full.v
    every = f"blade {policy}, every block"
    for sparsity in (0.0, *SPARSITIES):
        config = BladeConfig(policy=policy, sparsity=sparsity, grid=grid, when="always")
        call = lambda config=config: blade_compile.sparse_attention(q, k, v, config=config)  # noqa: E731
        if not sparsity:
            yield Arm(every, call, gate(forward_gate(full)), timed=False)
            continue
        check: Callable[[Tensor], float | None] = finite
        if policy != "asa_g" and config.inner_order == "none":
            lists = blade_compile.mask_predict(q, k, config=config)
            check = gate(forward_gate(Problem(q, k, v, *lists, config.block)))
        about = {"policy": policy, "sparsity": sparsity, "block": config.block}
        after = lambda call=call: {  # noqa: E731
            **kept(call), **_distance(full, call)(), "split": time_split(call, plan.device)
        }  # fmt: skip
        said = ", search at every call" if policy == "adaspa" else ""  # a generation searches at a few steps only
        name = f"blade {policy}{said}, sparsity {sparsity}"
        yield Arm(name, call, check, about=about, certified_by=every, after=after)


def finite(out: Tensor) -> float | None:
    """A check that refuses what is not finite, and knows no error."""
    if not out.isfinite().all():
        raise WrongResultError("the output is not finite")
    return None


def _backward(plan: Plan, dtype: torch.dtype, H: int, S: int, D: int) -> Case:
    def arms() -> list[Arm]:
        q, k, v, grad = inputs(plan, dtype, H, S, D, 4)
        p = _problem(q, k, v, 0.8, 128)
        full = _problem(q, k, v, 0.0, 128)
        density = p.kept_blocks / (H * p.num_blocks**2)
        attend = torch.ops.blade.block_sparse_attention
        sparse = lambda *t: attend(*t, p.num, p.idx, block_size=p.block)[0]  # noqa: E731
        backend, attention = _quickest(q)
        return [
            Arm("dense", _gradients(attention, q, k, v, grad), gate(backward_gate(full, grad)),
                about={"density": 1.0, "flops": 3.5 * full.flops, "sdpa": backend}),
            Arm("blade, sparsity 0.8, block 128", _gradients(sparse, q, k, v, grad), gate(backward_gate(p, grad)),
                about={"sparsity": 0.8, "block": 128, "density": round(density, 4), "flops": 3.5 * p.flops}),
        ]  # fmt: skip

    return Case(_name("forward and backward", dtype, S, D), arms, _about("forward and backward", dtype, H, S, D))


def _gradients(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Callable[[], Any]:
    """A call that runs forward and backward and returns (dq, dk, dv)."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad)


def _distance(full: Problem, call: Callable[[], Tensor]) -> Callable[[], dict[str, float]]:
    """The column with an arm's distance from dense attention in fp64, whatever it is, on a sampled query block."""
    head, row = full.sampled_rows()[1]

    def measure() -> dict[str, float]:
        found = call()[0, head, full.tokens(row)]
        return {"distance": float(f"{relative(found, exact_rows(full, head, row)[0]):.2e}")}

    return measure


def _problem(q: Tensor, k: Tensor, v: Tensor, sparsity: float, block: int) -> Problem:
    num, idx = torch.ops.blade.mask_predict(q, k, sparsity=sparsity, block_size=block)
    return Problem(q, k, v, num, idx, block)


def gate(check: Callable[[Any], float]) -> Callable[[Any], float]:
    """A check of `attention_gate` as the registry wants it."""

    def run(result: Any) -> float:
        try:
            return check(result)
        except AssertionError as error:
            raise WrongResultError(str(error)) from error

    return run
