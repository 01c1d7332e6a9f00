"""Token orders: the curve and the tiles themselves, the operator, and q, k, v reordered around an attention."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blade_compile.kernels import ops, ops_order, order

blade = torch.ops.blade
CPU = torch.device("cpu")
VIDEOS = [(13, 30, 45), (21, 30, 52), (33, 45, 80)]  # CogVideoX-5B, Wan2.1-1.3B, HunyuanVideo
GRIDS = [*VIDEOS, (1, 64, 64), (1, 45, 80), (31, 31, 31), (16, 16, 16), (5, 7, 97), (2, 2, 200)]

assert ops  # registers the operators


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    ops_order._cache.clear()
    ops_order._warn_once.cache_clear()
    yield
    ops_order._cache.clear()


def places(visited: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Coordinates [N, 3] in visiting order, by division."""
    T, H, W = grid
    return torch.stack((visited // (H * W), visited // W % H, visited % W), dim=1)


def spread(visited: Tensor, grid: tuple[int, ...], block: int = 128) -> float:
    """Mean squared distance of a token to the centre of its block."""
    whole = len(visited) // block * block
    where = places(visited[:whole], grid).double().view(-1, block, 3)
    return float((where - where.mean(1, keepdim=True)).square().sum(-1).mean())


def box_volume(visited: Tensor, grid: tuple[int, ...], block: int = 128) -> float:
    """Mean volume of the boxes around the blocks."""
    whole = len(visited) // block * block
    where = places(visited[:whole], grid).view(-1, block, 3)
    return float((where.amax(1) - where.amin(1) + 1).prod(-1).double().mean())


# --- the curve -------------------------------------------------------------------------------------------------------


def assert_a_path(visited: Tensor, grid: tuple[int, ...]) -> None:
    assert visited.dtype == torch.int64
    assert visited.sort().values.tolist() == list(range(math.prod(grid))), grid
    where = places(visited, grid)
    lengths = (where[1:] - where[:-1]).abs().sum(1)
    assert int((lengths != 1).sum()) == 0, f"{grid}: {int((lengths != 1).sum())} steps are longer than 1"


def test_gilbert_is_a_path_through_every_small_box() -> None:
    for grid in itertools.product(range(1, 7), repeat=3):
        assert_a_path(order.gilbert(*grid), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gilbert_is_a_path_through_the_grids_of_models(grid: tuple[int, int, int]) -> None:
    order._gilbert.cache_clear()
    start = time.perf_counter()
    visited = order.gilbert(*grid)
    assert time.perf_counter() - start < 1
    assert_a_path(visited, grid)


def test_gilbert_of_a_cube_fills_its_octants_one_by_one() -> None:
    """As Hilbert's curve does, at every level: 8, 64 and 512 consecutive tokens of 8^3 are cubes."""
    for side in (2, 4):
        where = places(order.gilbert(8, 8, 8), (8, 8, 8)).view(-1, side**3, 3)
        assert ((where.amax(1) - where.amin(1) + 1) == side).all()


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=str)
def test_blocks_are_more_compact_than_in_raster_order(grid: tuple[int, int, int]) -> None:
    raster = torch.arange(math.prod(grid))
    curve = order.gilbert(*grid)
    if grid not in {(1, 64, 64), (16, 16, 16), (1, 45, 80)}:  # there 128 tokens are about two rows: flat, but a box
        assert box_volume(curve, grid) < 0.65 * box_volume(raster, grid)
    assert spread(curve, grid) < 0.3 * spread(raster, grid)
    assert spread(order.tile(*grid, block_size=128), grid) < 0.5 * spread(raster, grid)


def test_blocks_of_the_curve_are_nearly_as_compact_as_cubes() -> None:
    """128 tokens as 4 x 4 x 8 have a mean squared distance of 7.75 from their centre."""
    for grid in VIDEOS:
        assert spread(order.gilbert(*grid), grid) < 10


def test_orders_are_copies() -> None:
    order.gilbert(2, 3, 4).zero_()
    order.tile(2, 3, 4, 16).zero_()
    assert order.gilbert(2, 3, 4).unique().numel() == 24
    assert order.tile(2, 3, 4, 16).unique().numel() == 24


def test_orders_are_real_while_a_model_is_traced() -> None:
    order._gilbert.cache_clear()
    with torch._subclasses.FakeTensorMode(), torch.device("meta"):
        order.gilbert(3, 5, 4)
    assert_a_path(order.gilbert(3, 5, 4), (3, 5, 4))


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "shape"), [(16, (2, 2, 4)), (32, (2, 4, 4)), (64, (4, 4, 4)), (128, (4, 4, 8))], ids=str
)
def test_a_block_is_a_tile_where_the_tiles_fit(block: int, shape: tuple[int, int, int]) -> None:
    grid = (3 * shape[0], 2 * shape[1], 3 * shape[2])
    assert order.tile_shape(*grid, block) == shape
    visited = order.tile(*grid, block)
    assert visited.sort().values.tolist() == list(range(math.prod(grid)))
    where = places(visited, grid).view(-1, block, 3)
    corners = where.amin(1)
    assert (where.amax(1) - corners + 1 == torch.tensor(shape)).all()
    assert (corners % torch.tensor(shape) == 0).all()
    beside = (corners[1:] - corners[:-1]).abs() / torch.tensor(shape)
    assert (beside.sum(1) == 1).all()


def test_tiles_are_whole_runs_of_tokens_at_ragged_edges_too() -> None:
    grid, block = (5, 7, 19), 64
    shape = torch.tensor(order.tile_shape(*grid, block))
    number = [tuple(tile) for tile in (places(order.tile(*grid, block), grid) // shape).tolist()]
    runs = [tile for tile, _ in itertools.groupby(number)]
    assert len(runs) == len(set(runs)) == math.prod(math.ceil(n / m) for n, m in zip(grid, shape.tolist()))


def test_a_tile_is_no_thicker_than_the_video() -> None:
    assert order.tile_shape(1, 64, 64, 128) == (1, 16, 8)
    assert order.tile_shape(2, 64, 64, 128) == (2, 8, 8)
    assert order.tile_shape(64, 1, 64, 16) in {(4, 1, 4), (2, 1, 8)}
    for block in (16, 32, 64, 128):
        for grid in itertools.product((1, 2, 3, 5, 9), repeat=3):
            assert math.prod(order.tile_shape(*grid, block)) == block


def test_inverse_undoes() -> None:
    for name in order.ORDERS:
        visited = order.token_order(name, (3, 5, 7), 16)
        x = torch.randn(105)
        assert torch.equal(x[visited][order.inverse(visited)], x)
        assert torch.equal(x[order.inverse(visited)][visited], x)


def test_bad_grids_and_names_raise() -> None:
    for grid in ((0, 2, 3), (2, 3, -1)):
        with pytest.raises(ValueError, match=r"three sizes \(T, H, W\), each at least 1"):
            order.gilbert(*grid)
    with pytest.raises(ValueError, match=r"three sizes"):
        order.token_order("gilbert", (4, 4), 16)
    with pytest.raises(ValueError, match=r"block_size is 48; valid are 16, 32, 64, 128"):
        order.tile(4, 4, 4, 48)
    with pytest.raises(ValueError, match=r"'hilbert'; valid are 'none', 'gilbert', 'tile'"):
        order.token_order("hilbert", (2, 2, 2), 16)


# --- the operator ----------------------------------------------------------------------------------------------------

OP_CASES = [
    ([2, 3, 4], "gilbert", 24, []),
    ([2, 3, 4], "tile", 29, [0, 5]),
    ([1, 5, 5], "gilbert", 32, [0, 3, 28, 4]),
    ([3, 3, 3], "none", 27, []),
    ([2, 3, 4], "gilbert", 40, []),  # does not fit
]


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_token_order_passes_opcheck(case: tuple[list[int], str, int, list[int]]) -> None:
    grid, name, tokens, protect = case
    torch.library.opcheck(blade.token_order.default, (grid, name, 16, tokens, protect, CPU))


@pytest.mark.parametrize("name", ["gilbert", "tile"])
@pytest.mark.parametrize("protect", [[], [0, 5], [24, 3], [0, 2, 11, 4, 30, 1], [-2, 2]], ids=str)
def test_protected_tokens_keep_their_places(name: str, protect: list[int]) -> None:
    grid = (2, 3, 4)
    held: set[int] = set()
    tokens = 24 + sum(protect[1::2])
    for start, length in zip(protect[::2], protect[1::2]):
        held |= {start % tokens + i for i in range(length)}
    free = [i for i in range(tokens) if i not in held]
    walk = iter(order.token_order(name, grid, 16).tolist())
    want = [i if i in held else free[next(walk)] for i in range(tokens)]
    forward, back = blade.token_order(grid, name, 16, tokens, protect, CPU)
    assert forward.tolist() == want
    assert [want[i] for i in back.tolist()] == list(range(tokens))


def test_results_are_fresh_and_the_kept_ones_bounded() -> None:
    arguments = ([2, 3, 4], "gilbert", 16, 24, [], CPU)
    first = blade.token_order(*arguments)
    want = [x.clone() for x in first]
    for x in first:
        x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(blade.token_order(*arguments), want))
    assert len(ops_order._cache) == 1
    for width in range(1, 50):
        blade.token_order([1, 2, width], "gilbert", 16, 2 * width, [], CPU)
    assert len(ops_order._cache) == ops_order._KEEP


def test_a_grid_that_does_not_fit_leaves_the_order_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="blade_compile"):
        for _ in range(3):
            forward, back = blade.token_order([2, 3, 4], "gilbert", 16, 30, [0, 2], CPU)
    assert forward.tolist() == back.tolist() == list(range(30))
    (message,) = [record.getMessage() for record in caplog.records if "grid" in record.getMessage()]
    assert "2 x 3 x 4 = 24" in message and "28 tokens" in message and "30 tokens, 2 of them protected" in message


def test_check_grid_says_both_numbers() -> None:
    ops_order.check_grid((2, 3, 4), 24)
    ops_order.check_grid((2, 3, 4), 30, (0, 4, -2, 2))
    with pytest.raises(ValueError, match=r"2 x 3 x 4 = 24 tokens, but 25 tokens .* order='none'"):
        ops_order.check_grid((2, 3, 4), 25)
    with pytest.raises(ValueError, match=r"= 24 tokens, but 23 tokens are to be ordered \(25 tokens, 2 of them prot"):
        ops_order.check_grid((2, 3, 4), 25, (0, 2))
    with pytest.raises(ValueError, match=r"three sizes"):
        ops_order.check_grid((2, 12), 24)


# --- around an attention ---------------------------------------------------------------------------------------------


def case(tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, tokens, 8, dtype=dtype),
        torch.randn(2, 2, keys, 8, dtype=dtype),
        torch.randn(2, 2, keys, 8, dtype=dtype),
    )


@pytest.mark.parametrize("name", ["gilbert", "tile"])
@pytest.mark.parametrize(
    ("extra_q", "extra_k", "protect_q", "protect_k"),
    [
        (0, 0, [], []),
        (5, 5, [0, 5], [0, 5]),  # joint attention, text first
        (0, 7, [], [24, 7]),  # keys = image + text
        (0, 13, [], [0, 4]),  # keys = something of another size: only the queries are reordered
        (9, 0, [], []),  # only the keys are
    ],
    ids=str,
)
def test_attention_is_the_same_in_any_order(
    name: str, extra_q: int, extra_k: int, protect_q: list[int], protect_k: list[int]
) -> None:
    grid = (2, 3, 4)
    q, k, v = case(24 + extra_q, 24 + extra_k)
    mask = torch.rand(2, k.shape[2]) > 0.3
    moved_q, moved_k, moved_v, moved_mask, inverse = ops_order.reordered(
        q, k, v, mask, grid, name, 16, protect_q, protect_k
    )
    assert (inverse is None) == (extra_q == 9)
    assert torch.equal(moved_q, q) == (extra_q == 9)
    assert torch.equal(moved_k, k) == (extra_k == 13)
    assert moved_mask is not None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)

    got = ops_order.restored(attend(moved_q, moved_k, moved_v, moved_mask), inverse)
    torch.testing.assert_close(got, attend(q, k, v, mask))


def test_every_key_keeps_its_own_mask_per_head() -> None:
    _, k, v = case(24, 29)
    mask = torch.arange(4 * 29).view(1, 4, 29).double()
    moved = ops_order.reordered(k, k, v, mask, (2, 3, 4), "gilbert", 16, [0, 5], [0, 5])
    for t in range(29):
        source = int((k[0, 0] == moved[1][0, 0, t]).all(-1).nonzero())
        assert torch.equal(moved[3][0, :, t], mask[0, :, source])  # type: ignore[index]


def test_nothing_is_reordered_without_an_order_or_a_grid() -> None:
    q, k, v = case(24, 24)
    for grid, name in (((2, 3, 4), "none"), ((), "gilbert")):
        moved = ops_order.reordered(q, k, v, None, grid, name, 16, [], [])
        assert moved[0] is q and moved[1] is k and moved[2] is v and moved[4] is None


def sparse(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return blade.sparse_sdpa(q, k, v, block_size=16, **options)  # type: ignore[no-any-return]


def test_gradients_of_every_input_equal_those_of_dense_attention() -> None:
    leaves = [x.requires_grad_() for x in case(29, 29)]
    protect = {"protect_q": [0, 5], "protect_k": [0, 5]}
    out = sparse(*leaves, sparsity=0.0, grid=[2, 3, 4], order="gilbert", **protect)
    want = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
    weight = torch.randn_like(out)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    for name, g, w in zip("qkv", got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, msg=lambda text, name=name: f"d{name}: {text}")


def test_permuted_is_differentiable_twice_and_under_functorch() -> None:
    way = torch.randperm(6)
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: ops_order.permuted(z, way).sin(), (x,))
    weight = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    got = torch.func.grad(lambda z: (ops_order.permuted(z, way) * weight).sum())(x.detach())
    want = torch.zeros_like(got)
    for i, at in enumerate(way.tolist()):
        want[:, :, at] = weight[:, :, i]
    assert torch.equal(got, want)


def test_a_block_that_is_near_in_space_is_kept_whole() -> None:
    """Keys that attract a query are its 4 x 4 x 4 neighbours: one block along the curve, several in raster order."""
    grid = (4, 8, 8)
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid)) // 4
    cube = where[:, 0] * 4 + where[:, 1] * 2 + where[:, 2]
    k = 8 * F.one_hot(cube, 8).double().view(1, 1, 256, 8)
    v = torch.randn(1, 1, 256, 8, dtype=torch.float64)
    want = F.scaled_dot_product_attention(k, k, v)
    options = {"sparsity": 0.75, "min_tokens": 0}
    error = {
        name: float((blade.sparse_sdpa(k, k, v, block_size=64, grid=list(grid), order=name, **options) - want).norm())
        for name in ("none", "gilbert", "tile")
    }
    assert error["gilbert"] < 1e-4 * float(want.norm()) and error["tile"] < 1e-4 * float(want.norm())
    assert error["none"] > 0.05 * float(want.norm())


def test_one_compilation_serves_all_grids() -> None:
    compiled: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        compiled.append(1)
        return torch._inductor.compile(gm, inputs)

    def attend(x: Tensor, frames: Tensor) -> Tensor:
        sizes = [frames.shape[0], frames.shape[1], frames.shape[2]]
        return blade.sparse_sdpa(x, x, x, sparsity=0.0, block_size=16, grid=sizes, order="gilbert", protect_q=[0, 3])

    run = torch.compile(attend, backend=backend, dynamic=True)
    for grid in ((3, 5, 6), (5, 7, 11), (4, 9, 8)):
        x = torch.randn(1, 2, math.prod(grid) + 3, 8)
        torch.testing.assert_close(run(x, torch.empty(grid)), F.scaled_dot_product_attention(x, x, x))
    assert len(compiled) == 1
