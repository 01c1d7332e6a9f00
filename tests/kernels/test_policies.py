"""Each policy's map against a plain reference written with loops, and what every policy promises."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blade_compile.kernels import (
    aten,
    block_grid,
    cpu_probe,
    lists,
    ops,  # noqa: F401 (registers the operators)
    order,
    policies,
    reference,
    selection,
)
from blade_compile.kernels.policies import MapPolicy, Request
from tests.kernels.attention_cases import padding_mask

CONTENT = ("asa", "vsa", "sparge", "xattention")
STATIC = ("sta", "radial")
BLOCK = 16


def request_of(
    H: int = 2,
    Hkv: int = 2,
    S: int = 75,
    T: int = 75,
    B: int = 1,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> Request:
    """Tokens that are alike within a block, more or less, so that all branches of all policies are taken."""
    base = torch.randn(B, H, -(-max(S, T) // BLOCK), 1, 8).double()
    noise = torch.rand(B, H, base.shape[2], 1, 1).double() * 3
    q = (base + noise * torch.randn(B, H, base.shape[2], BLOCK, 8)).flatten(2, 3)[:, :, :S]
    k = (base[:, :Hkv] + noise[:, :Hkv] * torch.randn(B, Hkv, base.shape[2], BLOCK, 8)).flatten(2, 3)[:, :, :T]
    bias = reference.additive_mask(mask, torch.float64 if dtype == torch.float64 else torch.float32)
    values: dict[str, Any] = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "bias": None if bias is None else bias.squeeze(2),
        "scale": 0.7,
        "block_size": BLOCK,
        "probe_tokens": 4,
        "seed": 3,
        "grid": None,
        "order": "none",
        "protect": (),
    }
    return Request(**{**values, **more})


def options_for(name: str) -> dict[str, Any]:
    return {"sparge": {"similarity": 0.3}, "xattention": {"stride": 4}, "asa": {"probe": "mean"}}.get(name, {})


def mapped(name: str, request: Request) -> Tensor:
    return policies.get(name).block_map(dataclasses.replace(request, options=options_for(name)))


# --- plain references: loops over blocks, tokens and pairs ------------------------------------------------------------


def visible(r: Request, h: int, tokens: range) -> tuple[list[int], list[float]]:
    """Visible key tokens and exp(bias) of each."""
    if r.bias is None:
        return list(tokens), [1.0] * len(tokens)
    row = r.bias[0, h if r.bias.shape[1] > 1 else 0].tolist()
    seen = [t for t in tokens if row[t] != -math.inf]
    return seen, [math.exp(row[t]) if row[t] > -700 else 0.0 for t in seen]


def mean(x: Tensor, tokens: list[int], weights: list[float]) -> Tensor:
    if sum(weights) == 0:
        weights = [1.0] * len(tokens)
    total = torch.zeros(x.shape[-1], dtype=torch.float64)
    for t, w in zip(tokens, weights):
        total += x[t] * w
    return total / sum(weights)


def blocks_of(num_tokens: int, size: int) -> list[range]:
    return [range(a, min(a + size, num_tokens)) for a in range(0, num_tokens, size)]


def log_mean(r: Request, h: int, tokens: list[int]) -> float:
    """Log of the mean of exp(bias)."""
    if r.bias is None:
        return 0.0
    row = r.bias[0, h if r.bias.shape[1] > 1 else 0]
    return float(row[tokens].logsumexp(0)) - math.log(len(tokens))


def normalised(scores: list[float | None]) -> list[float]:
    """Softmax in which None takes no part."""
    taking_part = [s for s in scores if s is not None]
    if not taking_part:
        return [0.0] * len(scores)
    top = max(taking_part)
    total = sum(math.exp(s - top) for s in taking_part)
    return [0.0 if s is None else math.exp(s - top) / total for s in scores]


def plain_vsa(r: Request) -> Tensor:
    H, Hkv = r.q.shape[1], r.k.shape[1]
    rows = []
    for h in range(H):
        k = r.k[0, h * Hkv // H]
        for queries in blocks_of(r.q.shape[2], BLOCK):
            q = mean(r.q[0, h], list(queries), [1.0] * len(queries))
            scores: list[float | None] = []
            for keys in blocks_of(r.k.shape[2], BLOCK):
                seen, weights = visible(r, h, keys)
                scores.append(r.scale * float(q @ mean(k, seen, weights)) + log_mean(r, h, seen) if seen else None)
            rows.append(normalised(scores))
    return torch.tensor(rows).view(1, H, -1, len(rows[0]))


def cosine(x: Tensor, tokens: list[int], weights: list[float]) -> float:
    """Mean over all pairs of tokens."""
    total, weight = 0.0, 0.0
    for (a, u), (b, v) in itertools.product(zip(tokens, weights), repeat=2):
        total += u * v * float(x[a] @ x[b]) / float(x[a].norm() * x[b].norm())
        weight += u * v
    return total / weight


def plain_sparge(r: Request) -> Tensor:
    H, Hkv, least = r.q.shape[1], r.k.shape[1], 0.3
    rows = []
    for h in range(H):
        k = r.k[0, h * Hkv // H]
        for queries in blocks_of(r.q.shape[2], BLOCK):
            ones = [1.0] * len(queries)
            q = mean(r.q[0, h], list(queries), ones)
            scores: list[float | None] = []
            kept, empty = [], []
            for keys in blocks_of(r.k.shape[2], BLOCK):
                seen, weights = visible(r, h, keys)
                if seen and sum(weights) == 0:
                    weights = [1.0] * len(seen)
                empty.append(not seen)
                kept.append(bool(seen) and cosine(k, seen, weights) < least)
                takes_part = seen and not kept[-1]
                scores.append(
                    r.scale * float(q @ mean(k, seen, weights)) + log_mean(r, h, seen) if takes_part else None
                )
            whole_row = cosine(r.q[0, h], list(queries), ones) < least
            row = normalised(scores)
            rows.append([math.nan if not e and (c or whole_row) else p for e, c, p in zip(empty, kept, row)])
    return torch.tensor(rows).view(1, H, -1, len(rows[0]))


def plain_xattention(r: Request) -> Tensor:
    stride, H, Hkv, S, T = 4, r.q.shape[1], r.k.shape[1], r.q.shape[2], r.k.shape[2]
    out = torch.zeros(1, H, len(blocks_of(S, BLOCK)), len(blocks_of(T, BLOCK)), dtype=torch.float64)
    for h in range(H):
        for i in range(0, S, stride):
            scores: list[float | None] = []
            for j in range(0, T, stride):
                seen, _ = visible(r, h, range(j, min(j + stride, T)))
                total = 0.0
                for step in range(stride):
                    a, b = i + stride - 1 - step, j + step
                    if a < S and b in seen:
                        total += float(r.q[0, h, a] @ r.k[0, h * Hkv // H, b])
                scores.append(r.scale / stride * total + log_mean(r, h, seen) if seen else None)
            for j, p in enumerate(normalised(scores)):
                out[0, h, i // BLOCK, j * stride // BLOCK] += p
    return out


PLAIN: dict[str, Callable[[Request], Tensor]] = {
    "asa": plain_vsa,
    "vsa": plain_vsa,
    "sparge": plain_sparge,
    "xattention": plain_xattention,
}


def masks(kind: str, H: int, T: int) -> Tensor | None:
    if kind != "heads":
        return None if kind == "none" else padding_mask(3, T, kind)[2:]  # type: ignore[index]
    hidden = torch.rand(1, H, T) > 0.7
    hidden[:, 0, :BLOCK] = True
    return torch.randn(1, H, T).masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("kind", ["none", "bool", "inf", "-1e4", "heads"])
@pytest.mark.parametrize("Hkv", [1, 2])
@pytest.mark.parametrize("name", CONTENT)
def test_map_equals_the_plain_reference(name: str, Hkv: int, kind: str) -> None:
    request = request_of(Hkv=Hkv, S=41, T=75, mask=masks(kind, 2, 75))
    found, want = mapped(name, request), PLAIN[name](request)
    assert found.dtype == torch.float32 and found.shape == (1, 2, 3, 5)
    torch.testing.assert_close(found.double(), want.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    if name == "sparge":
        assert found.isnan().any() and not found.isnan().all(), "the test takes both branches"


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize(("S", "T"), [(1, 1), (16, 16), (3, 50), (50, 3)])
def test_small_sizes(name: str, S: int, T: int) -> None:
    request = request_of(S=S, T=T)
    found = mapped(name, request)
    torch.testing.assert_close(found.double(), PLAIN[name](request).double(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_fp32(name: str, dtype: torch.dtype) -> None:
    low = request_of(dtype=dtype)
    exact = dataclasses.replace(low, q=low.q.double(), k=low.k.double())
    torch.testing.assert_close(mapped(name, low), mapped(name, exact), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("engine", ["cpp", "aten", "fp64"])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_sampled_asa_is_the_references_probe(engine: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "aten":
        monkeypatch.setattr(cpu_probe, "available", lambda: False)
    mask = masks(kind, 2, 75)
    r = request_of(Hkv=1, S=41, mask=mask, dtype=torch.float64 if engine == "fp64" else torch.float32)
    want = reference.probe_map(r.q, r.k, r.bias, r.scale, BLOCK, r.probe_tokens, r.seed)
    for name in ("asa", "asa_g"):
        torch.testing.assert_close(policies.get(name).block_map(r), want.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


# --- promises of every policy -----------------------------------------------------------------------------------------


def any_request(name: str, **more: Any) -> Request:
    on_grid = {"grid": (3, 5, 5)} if name in STATIC else {}
    return request_of(**{**on_grid, **more})


@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_values_are_not_negative_and_a_sample_is_the_same_alone(name: str) -> None:
    r = any_request(name, B=3, mask=padding_mask(3, 75, "inf"), dtype=torch.float32)
    found = mapped(name, r)
    assert found.shape == (3, 2, 5, 5) and (found.isnan() | (found >= 0)).all()
    for b in range(3):
        assert torch.equal(mapped(name, r.sample(b)).nan_to_num(-1), found[b : b + 1].nan_to_num(-1))


@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_hidden_keys_change_nothing(name: str) -> None:
    mask = torch.ones(1, 75, dtype=torch.bool)
    mask[:, 3:9], mask[:, 32:48] = False, False  # a part of block 0, the whole of block 2
    r = any_request(name, mask=mask)
    spoilt = r.k.masked_fill(~mask[:, None, :, None], math.nan)
    found = mapped(name, r)
    torch.testing.assert_close(found, mapped(name, dataclasses.replace(r, k=spoilt)), rtol=0, atol=0, equal_nan=True)
    assert (found[..., 2] == 0).all()
    others = found[..., [0, 1, 3, 4]]
    assert (others.isnan() | (others > 0)).all()


@pytest.mark.parametrize("name", CONTENT)
def test_nothing_visible_is_zero(name: str) -> None:
    assert not mapped(name, request_of(mask=torch.zeros(1, 75, dtype=torch.bool))).any()


@pytest.mark.parametrize("name", CONTENT)
def test_a_block_with_a_nan_is_kept(name: str) -> None:
    r = request_of()
    r.k[0, 1, 40], r.q[0, 0, 20] = math.nan, math.nan  # key block 2 of head 1, query block 1 of head 0
    found = mapped(name, r)
    assert found[0, 1, :, 2].isnan().all() and found[0, 0, 1].isnan().all()
    num, idx = selection.select(found, 0.8)
    assert lists.kept_blocks(num, idx, 5)[0, 1, :, 2].all() and (num[0, 0, 1] == 5)
    assert not found[0, 0, 0].isnan().all()


class _Largest(TorchDispatchMode):
    """The most elements that any operator's result holds."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().nbytes()]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_memory_is_bounded_by_copies_and_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "CHUNK_ELEMENTS", 1 << 16)
    r = request_of(H=2, Hkv=1, B=3, S=4096, T=4096, dtype=torch.float32)
    if name in STATIC:
        r = dataclasses.replace(r, grid=(16, 16, 16))
    with _Largest() as largest:
        mapped(name, r)
    nB = 4096 // BLOCK
    assert largest.elements <= max(1 << 16, 3 * 2 * nB * nB, r.q[0].numel()) < 4096 * 4096 // 8


@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_the_operator_selects_from_the_map(name: str) -> None:
    mask = padding_mask(2, 75, "bool")
    r = any_request(name, B=2, Hkv=1, mask=mask, dtype=torch.float32)
    r = dataclasses.replace(r, options=options_for(name))
    choice = {"tau": 0.8} if name in ("sparge", "xattention") else {"sparsity": 0.5}
    grid = list(r.grid or [])
    num, idx = torch.ops.blade.mask_predict(
        r.q,
        r.k,
        mask,
        r.scale,
        [],
        [],
        block_size=BLOCK,
        probe_tokens=4,
        seed=3,
        policy=name,
        options=json.dumps(r.options),
        grid=grid,
        head_sparsity=[],
        **choice,
    )
    want = reference.select_blocks(policies.get(name).block_map(r), **choice)
    assert torch.equal(num, want[0]) and torch.equal(idx, want[1])


# --- policies that rank by place --------------------------------------------------------------------------------------


def tokens_in_order(r: Request, num_tokens: int) -> list[tuple[int, int, int] | None]:
    """Coordinates of each token of the sequence, None for a protected one."""
    assert r.grid is not None
    T, H, W = r.grid
    raster = list(itertools.product(range(T), range(H), range(W)))
    visited = iter([raster[i] for i in order.token_order(r.order, r.grid, BLOCK).tolist()])
    off_grid = {t for start, length in r.protect for t in range(start, start + length)}
    return [None if t in off_grid else next(visited) for t in range(num_tokens)]


def on_grid_by_block(r: Request, num_tokens: int) -> list[list[tuple[int, int, int]]]:
    places = tokens_in_order(r, num_tokens)
    return [[p for t in block if (p := places[t]) is not None] for block in blocks_of(num_tokens, BLOCK)]


LAYOUTS = [
    {"grid": (3, 5, 5)},
    {"grid": (4, 4, 8), "order": "tile", "S": 128, "T": 128},
    {"grid": (5, 3, 6), "order": "gilbert", "S": 97, "T": 97, "protect": ((0, 7),)},
    {"grid": (5, 3, 6), "order": "tile", "S": 131, "T": 131, "protect": ((0, 35), (125, 6))},
    {"grid": (5, 3, 6), "S": 90, "T": 110, "protect": ((90, 20),)},
    {"grid": (1, 1, 5), "S": 5, "T": 5},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sta_windows_grow_with_the_budget(layout: dict[str, Any]) -> None:
    """The blocks at least as good as a value are those in the window of a share of the grid, shifted at the borders."""
    r = request_of(**layout)
    found = mapped("sta", r)
    assert (found == found[:, :1]).logical_or(found.isnan()).all()
    assert r.grid is not None
    mine = dataclasses.replace(r, protect=()) if r.q.shape[2] == math.prod(r.grid) else r
    queries, keys = (on_grid_by_block(x, n) for x, n in ((mine, r.q.shape[2]), (r, r.k.shape[2])))
    unit = block_grid.UNITS
    scale = 2.0 ** max(1, math.ceil(math.log2(unit * math.prod(r.grid) + 1)))

    def center(block: list[tuple[int, int, int]], axis: int) -> int:
        return sum(2 * p[axis] + 1 for p in block) * unit // (2 * len(block))

    for i, j in itertools.product(range(len(queries)), range(len(keys))):
        value = float(found[0, 0, i, j])
        if not queries[i] or not keys[j]:
            assert math.isnan(value)
            continue
        share = Fraction(unit * math.prod(r.grid) + 1 - int(value * scale), unit * math.prod(r.grid))

        def inside(x: list[tuple[int, int, int]], share: Fraction, c: list[tuple[int, int, int]] = queries[i]) -> bool:
            for axis, size in enumerate(r.grid or ()):
                length = share * size * unit
                start = min(max(center(c, axis) - length / 2, Fraction(0)), size * unit - length)
                if not start <= center(x, axis) <= start + length:
                    return False
            return True

        assert inside(keys[j], share)
        assert share == 0 or not inside(keys[j], share - Fraction(1, 4 * unit * math.prod(r.grid)))


def test_sta_is_the_published_window_on_whole_tiles() -> None:
    """5 x 5 x 5 tiles, window 3 x 3 x 3: each query keeps the 27 tiles around its tile, moved inwards at the border."""
    r = request_of(H=1, Hkv=1, S=2000, T=2000, grid=(10, 10, 20), order="tile")
    assert order.tile_shape(10, 10, 20, BLOCK) == (2, 2, 4)
    num, idx = selection.select(mapped("sta", r), 1 - 27 / 125)
    kept = lists.kept_blocks(num, idx, 125)[0, 0]
    tiles = [tuple(x // n for x, n in zip(block[0], (2, 2, 4))) for block in on_grid_by_block(r, 2000)]
    assert sorted(tiles) == list(itertools.product(range(5), repeat=3))
    for i, query in enumerate(tiles):
        middle = [min(max(u, 1), 3) for u in query]
        want = [max(abs(u - m) for u, m in zip(key, middle)) <= 1 for key in tiles]
        assert kept[i].tolist() == want


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_radial_ranks_by_the_published_cost(layout: dict[str, Any]) -> None:
    r = request_of(**layout)
    found = mapped("radial", r)
    assert r.grid is not None
    mine = dataclasses.replace(r, protect=()) if r.q.shape[2] == math.prod(r.grid) else r
    queries, keys = (on_grid_by_block(x, n) for x, n in ((mine, r.q.shape[2]), (r, r.k.shape[2])))
    for i, query in enumerate(queries):
        costs: dict[int, float] = {}
        for j, key in enumerate(keys):
            if not query or not key:
                assert math.isnan(found[0, 1, i, j])
                continue
            (t, *a), (u, *b) = query[len(query) // 2], key[len(key) // 2]
            space = abs((a[0] - b[0]) * r.grid[2] + a[1] - b[1])
            costs[j] = 2 ** math.floor(math.log2(max(abs(t - u), 1))) * (space + 1)
            if any(p[0] == 0 for p in key):
                costs[j] = 0  # the sink, before everything but the block itself
            if query[len(query) // 2] == key[len(key) // 2]:
                costs[j] = -1
        values = {j: float(found[0, 1, i, j]) for j in costs}
        for j, m in itertools.combinations(costs, 2):
            assert (values[j] > values[m]) == (costs[j] < costs[m]) and (values[j] < values[m]) == (costs[j] > costs[m])


@pytest.mark.parametrize("name", STATIC)
def test_every_row_keeps_the_budget(name: str) -> None:
    num, _ = selection.select(mapped(name, request_of(S=320, T=320, grid=(5, 8, 8), order="tile")), 0.7)
    assert (num == 6).all()


@pytest.mark.parametrize("name", STATIC)
def test_a_large_grid_keeps_its_ranking(name: str) -> None:
    """HunyuanVideo's grid: costs stay within the floats that hold integers."""
    r = request_of(H=1, Hkv=1, S=115200, T=115200, grid=(32, 45, 80), dtype=torch.float32)
    r = dataclasses.replace(r, block_size=128)
    found = mapped(name, r)
    assert found.shape == (1, 1, 900, 900) and (found > 0).all() and (found <= 1).all()
    middle = found[0, 0, 450]
    assert int(middle.argmax()) == 450 and middle[450] > middle[:450].max()


@pytest.mark.parametrize("name", STATIC)
def test_grids_that_do_not_fit_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match="found no token grid"):
        mapped(name, request_of())
    with pytest.raises(ValueError, match=r"grid=\(3, 5, 4\) holds 60 tokens, but 70 of the 75 query tokens"):
        mapped(name, request_of(grid=(3, 5, 4), protect=((0, 5),)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_a_gpu_makes_the_same_map_and_a_graph_can_be_captured(name: str) -> None:
    r = any_request(name, B=2, Hkv=1, mask=padding_mask(2, 75, "inf"), dtype=torch.float32)
    there = dataclasses.replace(r, q=r.q.cuda(), k=r.k.cuda(), bias=r.bias.cuda())  # type: ignore[union-attr]
    found, want = mapped(name, there).cpu(), mapped(name, r)
    tolerance = 0.0 if name in STATIC else 1e-5
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        num, idx = selection.select(mapped(name, there), 0.5)
    there.q.copy_(there.q.flip(2))
    graph.replay()
    again = selection.select(mapped(name, there), 0.5)
    assert torch.equal(num, again[0]) and torch.equal(idx, again[1])


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))

    def diagonal(request: Request) -> Tensor:
        size = -(-request.q.shape[2] // request.block_size)
        return torch.eye(size).mul(request.options["weight"]).expand(1, request.q.shape[1], size, size)

    policies.register(MapPolicy("diagonal", diagonal, defaults={"sparsity": 0.8}, options={"weight": 2.0}))
    assert "diagonal" in policies.names() and policies.defaults("diagonal") == {"sparsity": 0.8}
    assert policies.options("diagonal") == ("weight",) and not policies.needs_grid("diagonal")
    r = request_of(B=2, dtype=torch.float32)
    num, idx = torch.ops.blade.mask_predict(r.q, r.k, sparsity=0.8, block_size=BLOCK, policy="diagonal")
    assert (num == 1).all() and (idx[..., 0] == torch.arange(5)).all()
    with pytest.raises(ValueError, match="exists"):
        policies.register(MapPolicy("diagonal", diagonal))


def test_names_are_known() -> None:
    assert set(policies.names()) == {"asa", "asa_g", "adaspa", "dense", *CONTENT, *STATIC}
    assert policies.needs_grid("sta") and policies.needs_grid("radial") and not policies.needs_grid("vsa")
    assert policies.defaults("vsa") == {"sparsity": 0.8, "block_size": 64}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xattention", {"stride": 5}, "divisor of the block size 16"),
        ("xattention", {"stride": 0}, "divisor"),
        ("xattention", {"strid": 4}, "no option 'strid'; valid: stride"),
        ("sparge", {"similarity": 2}, "mean cosine"),
        ("asa", {"probe": "max"}, "'sample' and 'mean'"),
        ("vsa", {"probe": "mean"}, "none at all"),
    ],
)
def test_bad_options_are_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policies.get(name).block_map(request_of(options=options))
    with pytest.raises(ValueError, match="'nobody' is unknown; valid are"):
        policies.get("nobody")
