"""The grid of the tokens as the graph shows it: real models, hand-written ones, dynamic sizes, and what shows none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from blade_compile.kernels import ops  # noqa: F401 (registers the operators)
from blade_compile.passes.extents import hints
from blade_compile.passes.find_attention import AttentionSite, find_sites
from blade_compile.passes.grid import Grid, find_grid
from blade_compile.passes.rewrite import rewrite_site
from tests.tools import count_ops
from tests.zoo.diffusers_zoo import ENTRIES

Found = list[tuple[AttentionSite, Grid]]


def found_in(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Found:
    """The sites that are no cross-attention or the like, each with its grid."""
    found: Found = []

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        found.extend((site, find_grid(site)) for site in find_sites(gm) if not site.code_refuses)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def sizes_of(grid: Grid) -> tuple[int, ...] | None:
    return None if grid.sizes is None else hints(grid.sizes)


# --- real models -----------------------------------------------------------------------------------------------------

MODELS = {
    "WanTransformer3DModel": ((3, 6, 6), "the output of conv3d in patch_embedding"),
    "CogVideoXTransformer3DModel": ((3, 6, 6), "the output of conv2d in patch_embed.proj"),  # frames in the batch
    "HunyuanVideoTransformer3DModel": ((3, 6, 6), "the output of conv3d in x_embedder.proj"),
    "LTXVideoTransformer3DModel": ((3, 6, 6), "a position table that flatten in rope flattens"),
    "AllegroTransformer3DModel": ((3, 6, 6), "the output of conv2d in pos_embed.proj"),
    "CosmosTransformer3DModel": ((3, 6, 6), "the frames, rows and columns of an input"),  # patches of a reshape
    "SD3Transformer2DModel": ((1, 8, 12), "the output of conv2d in pos_embed.proj"),
    "PixArtTransformer2DModel": ((1, 12, 12), "the output of conv2d in pos_embed.proj"),
    "QwenImageTransformer2DModel": ((1, 8, 12), "a position table that reshape in pos_embed flattens"),
    "HeliosTransformer3DModel": ((3, 6, 6), "the output of conv3d in patch_embedding"),  # history frames before it
    "FluxTransformer2DModel": (None, "no convolution, patches or position table"),  # packed outside the model
}


def entry_named(name: str) -> Any:
    return next(entry for entry in ENTRIES if entry.name == name)


QUICK = ("CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel", "FluxTransformer2DModel")
"""Tracing a model takes seconds: the others are for `make test-slow`."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_models_of_diffusers(name: str) -> None:
    entry = entry_named(name)
    args, kwargs = entry.inputs(0)
    want, where = MODELS[name]
    main = [(site, grid) for site, grid in found_in(entry.build(), *args, **kwargs) if "refiner" not in site.name]
    assert main
    for site, grid in main:
        assert sizes_of(grid) == want, f"{site.name}: {grid.sentence}"
        assert where in grid.sentence
        if want is None:
            assert "give grid=(T, H, W)" in grid.sentence


@pytest.mark.slow
def test_latte_alternates_between_frames_and_pixels() -> None:
    entry = entry_named("LatteTransformer3DModel")
    args, kwargs = entry.inputs(0)
    found = {site.name: grid for site, grid in found_in(entry.build(), *args, **kwargs)}
    spatial, temporal = found["transformer_blocks.0.attn1"], found["temporal_transformer_blocks.0.attn1"]
    assert sizes_of(spatial) == (1, 8, 8)
    assert temporal.sizes is None


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", pytest.param("HunyuanVideoTransformer3DModel", marks=pytest.mark.slow)]
)
def test_models_with_dynamic_sizes(name: str) -> None:
    entry = entry_named(name)
    args, kwargs = entry.inputs(0)
    found = [(s, g) for s, g in found_in(entry.build(), *args, dynamic=True, **kwargs) if "refiner" not in s.name]
    assert found
    for _, grid in found:
        assert sizes_of(grid) == (3, 6, 6)
        assert all(isinstance(size, torch.SymInt) for size in grid.sizes or ())


# --- hand-written models ---------------------------------------------------------------------------------------------

WIDTH, HEADS = 32, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if table is not None:
            q, k = q * table, k * table
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Patches by a 3-D convolution, text after them."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat((self.embed(video).flatten(2).transpose(1, 2), text), 1)
        for layer in self.layers:
            x = layer(x)
        return x


class Patches(nn.Module):
    """As einops writes it: b c (t 1) (h 2) (w 2) -> b (t h w) (c 2 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(16, WIDTH), Attention()

    def forward(self, video: Tensor) -> Tensor:
        B, C, T, H, W = video.shape
        x = video.reshape(B, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        return self.attention(self.embed(x.reshape(B, T * (H // 2) * (W // 2), 4 * C)))


class Unpatched(nn.Module):
    """Tokens come in as such; the output is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(8, WIDTH), nn.ModuleList((Attention(), Attention()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x.unflatten(1, (3, 6, 4)).permute(0, 4, 1, 2, 3)


class Table(nn.Module):
    """Tokens come in as such; rotary frequencies are made for frames, rows and columns."""

    def __init__(self, tables: Sequence[tuple[int, int, int]] = ((3, 6, 4),)) -> None:
        super().__init__()
        self.attention, self.tables = Attention(), tables

    def forward(self, tokens: Tensor) -> Tensor:
        total: Any = 1
        for T, H, W in self.tables:
            t, h, w = torch.arange(T), torch.arange(H), torch.arange(W)
            grid = t.view(T, 1, 1).expand(T, H, W) + h.view(1, H, 1) + 2.0 * w.view(1, 1, W)
            total = total * grid.cos().reshape(-1, 1)
        return self.attention(tokens, total)


def test_a_convolution_shows_the_grid_to_every_layer() -> None:
    for T, H, W in ((2, 6, 10), (1, 6, 10), (4, 2, 6)):
        found = found_in(Convolution(3), torch.randn(2, 4, T, H, W), torch.randn(2, 5, WIDTH))
        assert len(found) == 3
        for site, grid in found:
            assert [tuple(part) for part in site.protect_q] == [(T * H * W // 4, 5)]
            assert math.prod(sizes_of(grid) or ()) == T * H * W // 4
            # An axis of one token is no axis: 4 x 1 x 3 is the image 1 x 4 x 3.
            assert sizes_of(grid) == ((1, 4, 3) if H == 2 else (T, H // 2, W // 2))


def test_patches_of_a_reshape() -> None:
    ((_, grid),) = found_in(Patches(), torch.randn(2, 4, 3, 8, 10))
    assert sizes_of(grid) == (3, 4, 5)
    assert "the frames, rows and columns of" in grid.sentence


def test_a_rearranged_axis_order_is_followed() -> None:
    """b (h w t): the curve is made for what the tokens are, outermost first."""

    class Rearranged(Patches):
        def forward(self, video: Tensor) -> Tensor:
            x = video.permute(0, 3, 4, 2, 1).flatten(1, 3)
            return self.attention(F.pad(x, (0, WIDTH - 4)))

    ((_, grid),) = found_in(Rearranged(), torch.randn(1, 4, 3, 5, 7))
    assert sizes_of(grid) == (5, 7, 3)


def test_the_output_shows_the_grid() -> None:
    for _, grid in found_in(Unpatched(), torch.randn(2, 72, 8)):
        assert sizes_of(grid) == (3, 6, 4)
        assert "the output that unflatten puts together" in grid.sentence


def test_a_position_table_shows_the_grid() -> None:
    ((_, grid),) = found_in(Table(), torch.randn(1, 72, WIDTH))
    assert sizes_of(grid) == (3, 6, 4)
    assert "a position table that reshape flattens" in grid.sentence


def test_tables_that_disagree_show_none() -> None:
    ((_, grid),) = found_in(Table(((3, 6, 4), (2, 6, 6))), torch.randn(1, 72, WIDTH))
    assert grid.sizes is None
    assert "3 x 6 x 4" in grid.sentence and "2 x 6 x 6" in grid.sentence and "give grid" in grid.sentence


def test_a_convolution_outweighs_tables() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rest = nn.Conv3d(4, WIDTH, 1), Table(((2, 6, 6),))

        def forward(self, video: Tensor) -> Tensor:
            return self.rest(self.embed(video).flatten(2).transpose(1, 2))

    ((_, grid),) = found_in(Both(), torch.randn(1, 4, 3, 6, 4))
    assert sizes_of(grid) == (3, 6, 4)


def test_a_finer_split_counts_for_a_coarser_one() -> None:
    """Pixels flattened first, frames later: T x HW and T x H x W are no disagreement."""

    class Twice(Patches):
        def forward(self, video: Tensor) -> Tensor:
            x = video.permute(0, 2, 3, 4, 1).flatten(2, 3)
            return self.attention(F.pad(x.flatten(1, 2), (0, WIDTH - 4)))

    ((_, grid),) = found_in(Twice(), torch.randn(1, 4, 3, 5, 7))
    assert sizes_of(grid) == (3, 5, 7)


def test_one_block_by_itself_shows_none() -> None:
    ((site, grid),) = found_in(Attention(), torch.randn(1, 72, WIDTH))
    assert grid.sizes is None
    assert grid.sentence.startswith("no grid: no convolution") and "72 tokens" in grid.sentence
    refused = AttentionSite("a", "sdpa", site.node, code="cross")
    assert find_grid(refused) == Grid(None, "no grid: the attention could not be read")


def test_heads_and_features_of_the_same_number_are_no_grid() -> None:
    """32 tokens of 32 features, which are split into heads, and a batch of 2 x 16 tokens flattened to 32 rows."""
    ((_, grid),) = found_in(Attention(), torch.randn(1, WIDTH, WIDTH))
    assert grid.sizes is None

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.gate = Attention(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            gate = self.gate(y.reshape(-1, WIDTH)).view(y.shape).mean((0, 1))
            return self.attention(x) * gate

    ((_, grid),) = found_in(Rows(), torch.randn(1, 32, WIDTH), torch.randn(2, 16, WIDTH))
    assert grid.sizes is None


def test_equal_sides_and_tokens_equal_to_the_width() -> None:
    """Everything is 32 or a square: the axes are told apart by where they come from, not by size."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 64, 1), nn.MultiheadAttention(64, 8, batch_first=True)

        def forward(self, image: Tensor) -> Tensor:
            x = self.embed(image).flatten(2).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    ((_, grid),) = found_in(Square(), torch.randn(8, 3, 8, 8))
    assert sizes_of(grid) == (1, 8, 8)


def test_protected_ranges_given_by_the_user_count() -> None:
    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        (site,) = find_sites(gm)
        assert sizes_of(find_grid(site, ((-5, 5),))) == (2, 3, 5)
        assert find_grid(site, ()).sizes is None
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Convolution(1), backend=backend)(torch.randn(1, 4, 2, 6, 10), torch.randn(1, 5, WIDTH))


# --- dynamic sizes, through the rewrite ------------------------------------------------------------------------------


class Reordering:
    """Rewrites with the grid found and every block kept: the result must equal the model's own at every size."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.grids: list[Grid] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        options: dict[str, Any] = {"sparsity": 0.0, "when": "always", "block_size": 16, "order": "gilbert"}
        for site in find_sites(gm):
            grid = find_grid(site)
            self.grids.append(grid)
            protect = {"protect_q": _flat(site.protect_q), "protect_k": _flat(site.protect_k)}
            rewrite_site(gm.graph, site, {**options, **protect, "grid": list(grid.sizes or ())})
        gm.recompile()
        self.graphs.append(gm)
        return gm.forward


def _flat(ranges: Sequence[tuple[Any, Any]]) -> list[Any]:
    return [number for start, length in ranges for number in (start, length)]


@pytest.mark.parametrize("build", [Convolution, Patches])
def test_one_graph_serves_all_sizes(build: type[nn.Module]) -> None:
    model, backend = build(), Reordering()
    text = (torch.randn(2, 5, WIDTH),) if build is Convolution else ()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for T, H, W in ((3, 8, 12), (5, 14, 10), (7, 6, 20)):
            video = torch.randn(2, 4, T, H, W)
            torch.testing.assert_close(compiled(video, *text), model(video, *text))
    assert len(backend.graphs) == 1
    assert all(grid.sizes is not None for grid in backend.grids)
    assert count_ops(backend.graphs[0])["blade.sparse_sdpa"] == len(backend.grids)
