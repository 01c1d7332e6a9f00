"""Orders in which the tokens of a T x H x W grid are visited, so that consecutive ones are close in space and time.

``gilbert``: a generalised Hilbert curve through any box (BLADE section 3.2, algorithms 1.6; Hilbert 1891). ``tile``:
3-D tiles of as many tokens as a block, as sliding-tile attention cuts them. Both are raster indices in visiting order;
the raster index of (t, h, w) is (t * H + h) * W + w.

The curve is found, not tabulated. A box is entered at one corner and left at another; it is cut into two near the
middle of each of its long axes, and a depth-first search strings the parts together, each again from corner to corner
and the next one entered right beside the exit of the last. Corners alternate in colour like a chessboard's, which
tells beforehand which pairs of corners a path can join: only those are tried. For a cube of 2^n this is a Hilbert
curve. Every step is a step to a neighbour, in every box: the ends of the whole are chosen so that the colours allow it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checks import BLOCK_SIZES

ORDERS = ("none", "gilbert", "tile")

Box = tuple[int, ...]
Axes = tuple[int, ...]
Corner = tuple[int, ...]
"""per axis: 0 the low side, 1 the high side"""
Cells = NDArray[np.int64]

_AXES = (0, 1, 2)
_TILES = {16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}


def token_order(order: str, grid: tuple[int, ...], block_size: int) -> Tensor:
    """Raster indices int64 [T*H*W] of the tokens in the order ``order`` ("none", "gilbert" or "tile").

    Raises:
        ValueError: an unknown order, or what ``gilbert`` and ``tile`` refuse.
    """
    T, H, W = _sizes(grid)
    if order == "none":
        return torch.from_numpy(np.arange(T * H * W, dtype=np.int64))
    if order == "gilbert":
        return gilbert(T, H, W)
    if order == "tile":
        return tile(T, H, W, block_size)
    raise ValueError(f"order is {order!r}; valid are {', '.join(map(repr, ORDERS))}.")


def gilbert(T: int, H: int, W: int) -> Tensor:
    """The generalised Hilbert curve through a T x H x W grid: raster indices int64 [T*H*W] in visiting order.

    Consecutive tokens are neighbours in the grid (their coordinates differ by one in one axis), for any sizes.

    Raises:
        ValueError: a size below 1.
    """
    return torch.from_numpy(_gilbert(_sizes((T, H, W))).copy())


def tile(T: int, H: int, W: int, block_size: int) -> Tensor:
    """Tokens of 3-D tiles one after the other, those of a tile in raster order: int64 [T*H*W].

    A tile is ``tile_shape`` tokens; at the far edges it is cut off. Where the shape divides the grid, a block is a
    tile. Elsewhere a block may hold the end of one tile and the start of the next; so tiles follow each other to and
    fro, row by row and frame by frame, and the next one is always beside the last.

    Raises:
        ValueError: a size below 1, or a block size that is none.
    """
    return torch.from_numpy(_tile(_sizes((T, H, W)), tile_shape(T, H, W, block_size)).copy())


def tile_shape(T: int, H: int, W: int, block_size: int) -> tuple[int, int, int]:
    """Tokens of a tile along each axis, their product ``block_size``: 4 x 4 x 8 for 128.

    Where an axis of the grid is shorter than its side of the tile, that side is halved for the benefit of the axis
    that has the most tiles: 1 x 16 x 8 for the 128 tokens of an image.
    """
    sizes = _sizes((T, H, W))
    if block_size not in _TILES:
        raise ValueError(f"block_size is {block_size}; valid are {', '.join(map(str, BLOCK_SIZES))}.")
    shape = list(_TILES[block_size])
    while True:
        short = [a for a in _AXES if shape[a] > sizes[a]]
        room = [a for a in _AXES if 2 * shape[a] <= sizes[a]]
        if not short or not room:
            return shape[0], shape[1], shape[2]
        shape[short[0]] //= 2
        shape[max(room, key=lambda a: sizes[a] / shape[a])] *= 2


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``, both int64 [N]: ``x[order][inverse(order)]`` is x."""
    out = torch.empty_like(order)
    out[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return out


def _sizes(grid: tuple[int, ...]) -> Box:
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"grid is {tuple(grid)}; expected three sizes (T, H, W), each at least 1.")
    return tuple(int(size) for size in grid)


# NumPy arrays are kept, not tensors: a tensor made while something else is traced or moved to a device would be
# a fake one, or lie there.
@functools.lru_cache(maxsize=32)
def _tile(sizes: Box, shape: Box) -> Cells:
    t, h, w = np.indices(sizes).reshape(3, -1) // np.array(shape)[:, None]
    _, rows, columns = (-(-n // m) for n, m in zip(sizes, shape))
    row = t * rows + np.where(t % 2, rows - 1 - h, h)
    tile_number = row * columns + np.where(row % 2, columns - 1 - w, w)
    return np.argsort(tile_number, kind="stable").astype(np.int64)


@functools.lru_cache(maxsize=32)
def _gilbert(sizes: Box) -> Cells:
    t, h, w = _Curve().whole(sizes).T
    return (t * sizes[1] + h) * sizes[2] + w


class _Curve:
    """Paths through boxes, kept while one grid is made: its parts come in a few dozen sizes."""

    def __init__(self) -> None:
        self._paths: dict[tuple[Box, Axes], Cells] = {}

    def whole(self, box: Box) -> Cells:
        """A path through the box between the corners that suit its shape best: coordinates int64 [N, 3]."""
        if max(box) == 1:
            return np.zeros((1, 3), dtype=np.int64)
        every = [axes for count in (1, 2, 3) for axes in itertools.combinations(_AXES, count) if _joins(box, axes)]
        return self.path(box, min(every, key=lambda ends: (_strain(box, ends), len(ends), -_longest(box, ends))))

    def path(self, box: Box, ends: Axes) -> Cells:
        """A path from the lowest corner to the one that differs from it in the axes ``ends``."""
        key = (box, ends)
        if key not in self._paths:
            self._paths[key] = self._made(box, ends)
        return self._paths[key]

    def _made(self, box: Box, ends: Axes) -> Cells:
        if prod(box) == max(box):  # a line
            return np.arange(max(box))[:, None] * (np.array(box) > 1)
        for axes in _cut_axes(box, ends):
            for cut in _cuts(box, axes):
                steps = _route(box, ends, axes, cut)
                if steps is not None:
                    return np.concatenate([self._placed(*step) for step in steps])
        raise AssertionError(f"no path through {box} between corners that differ in {ends}")

    def _placed(self, origin: Box, box: Box, start: Corner, ends: Axes) -> Cells:
        cells = self.path(box, ends)
        high = np.array(start) * (np.array(box) - 1)
        return np.array(origin) + np.where(np.array(start) == 1, high - cells, cells)


def _joins(box: Box, ends: Axes) -> bool:
    """Whether the colours of the two corners allow a path that visits every cell once, one step at a time.

    An even number of cells takes ends of different colours, an odd number two of the colour of the corner.
    """
    if any(box[a] == 1 for a in ends):
        return False
    if prod(box) % 2:
        return bool(ends) or prod(box) == 1
    return sum(box[a] % 2 == 0 for a in ends) % 2 == 1


def _long(box: Box) -> Axes:
    """The axes that are cut so that the parts come closer to cubes."""
    return tuple(a for a in _AXES if box[a] > 1 and 3 * box[a] > 2 * max(box))


def _longest(box: Box, axes: Axes) -> int:
    return max(box[a] for a in axes)


def _strain(box: Box, ends: Axes) -> int:
    """How badly the ends suit the box: 0 if all long axes can be cut at once, 3 if none of them can.

    A walk through 2, 4 or 8 parts ends in a part that is on the other side in an odd number of the cut axes.
    """
    if prod(box) == max(box):
        return 0
    return (3, 0, 1, 0)[len(set(_long(box)) & set(ends))]


def _cut_axes(box: Box, ends: Axes) -> list[Axes]:
    """Which axes to cut, best first."""
    usable = [a for a in _AXES if box[a] > 1]
    every = [axes for count in (3, 2, 1) for axes in itertools.combinations(usable, count)]
    long = _long(box)
    walks = [axes for axes in every if len(set(axes) & set(ends)) % 2]
    return sorted(walks, key=lambda axes: (axes != long, not set(axes) <= set(long), -_longest(box, axes)))


def _cuts(box: Box, axes: Axes) -> Iterator[dict[int, int]]:
    """Where to cut each axis: near the middle, after an even number of cells if possible (those have most paths)."""
    near = [range(max(1, box[a] // 2 - 1), min(box[a] - 1, box[a] // 2 + 1) + 1) for a in axes]
    best = [sorted(places, key=lambda at, n=box[a]: (at % 2, abs(2 * at - n))) for a, places in zip(axes, near)]  # type: ignore[misc]
    for places in itertools.product(*best):
        yield dict(zip(axes, places))


_Step = tuple[Box, Box, Corner, Axes]
"""origin and sizes of a part, the corner where it is entered, and the axes in which the exit differs from it"""


def _route(box: Box, ends: Axes, axes: Axes, cut: dict[int, int]) -> list[_Step] | None:
    """The parts in the order of a path through all of them; None where this cut has no such path."""
    goal = tuple(int(a in axes and a in ends) for a in _AXES)
    steps: list[_Step] = []

    def sizes(part: Corner) -> Box:
        return tuple((box[a] - cut[a] if part[a] else cut[a]) if a in cut else box[a] for a in _AXES)

    def walk(part: Corner, start: Corner, seen: frozenset[Corner]) -> bool:
        inside = sizes(part)
        origin = tuple(cut[a] if part[a] else 0 for a in _AXES)
        if len(seen) == 2 ** len(axes):
            over = tuple(a for a in _AXES if inside[a] > 1 and start[a] != int(a in ends))
            steps.append((origin, inside, start, over))
            return part == goal and _joins(inside, over)
        ways = [(over, a) for a in axes for over in _exits(inside, start, a, 1 - part[a])]
        for over, a in sorted(ways, key=lambda way: (_strain(inside, way[0]), len(way[0]))):
            there = _flipped(part, (a,))
            if there in seen or (there == goal and len(seen) + 1 < 2 ** len(axes)):
                continue
            entry = list(_flipped(start, over))
            entry[a] = part[a]  # right beside the exit: the low side when coming from below
            depth = len(steps)
            steps.append((origin, inside, start, over))
            if walk(there, tuple(entry), seen | {there}):
                return True
            del steps[depth:]
        return False

    low = (0, 0, 0)
    return steps if walk(low, low, frozenset({low})) else None


def _exits(box: Box, start: Corner, axis: int, side: int) -> Iterator[Axes]:
    """The corners on one face that a path from ``start`` can end in, as the axes in which they differ from it."""
    usable = [a for a in _AXES if box[a] > 1]
    for count in range(len(usable) + 1):
        for over in itertools.combinations(usable, count):
            on_face = box[axis] == 1 or start[axis] ^ (axis in over) == side
            if on_face and _joins(box, over):
                yield over


def _flipped(corner: Corner, axes: Axes) -> Corner:
    return tuple(side ^ (a in axes) for a, side in enumerate(corner))
