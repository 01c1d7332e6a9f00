"""Draws `docs/graph.svg`: the graph of an attention layer as blade's pass found it and as it left it.

    python docs/graph_picture.py

The text comes from the pass's own dump (logger ``blade_compile.graphs``); only the names of weights are shortened.
"""

from __future__ import annotations

import html
import logging
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import blade_compile

OUT = Path(__file__).resolve().parent / "graph.svg"
ASSIGNED = re.compile(r'^ {8}(\w+)(?:: "(.*?)")? = (.*?)(?:;  .*)?$', re.MULTILINE)
WEIGHT = re.compile(r"\bl_self_modules_(\w+?)_parameters_(\w+?)_(?=\W)")
LEFT, ARCS, WIDTH, ROW, TOP = 16, 28, 760, 28, 44
PAPER, INK, DIM, GONE, NEW = "#ffffff", "#1f2328", "#6b7280", "#fbd5d5", "#cdeccf"


class Node(NamedTuple):
    """A line of a dumped graph."""

    name: str
    shape: str
    call: str


class Layer(nn.Module):
    """Attention as somebody might write it, without a word to blade or to `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 64] -> the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT * 32**-0.5, -1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def dumps() -> tuple[str, str]:
    """The graph before and after the rewrite, as text."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("blade_compile.graphs")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        options = {"sparsity": 0.8, "when": "always"}
        with torch.no_grad():
            blade_compile.explain(Layer().eval(), torch.randn(1, 4096, 64), blade_options=options)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    before, after = found
    return before, after


def nodes(dump: str) -> list[Node]:
    """The operators of a dump; lines that only rename an input are left out."""
    lines = [Node(*match) for match in ASSIGNED.findall(dump)]
    return [Node(name, shape, _short(call)) for name, shape, call in lines if not name.startswith("l_")]


def _short(call: str) -> str:
    call = WEIGHT.sub(lambda match: f"{match[1]}.{match[2]}", call).replace("l_x_", "x")
    call = re.sub(r"torch\.(?:_C\._nn|nn\.functional|ops)\.|\.default(?=\()", "", call)
    if call.startswith("blade."):
        kept = re.findall(r"(?<=, )sparsity = [^,]+", call)
        call = f"{call.split('key_mask')[0]}{', '.join(kept).replace(' = ', '=')}, ...)"
    return call


def column(title: str, graph: list[Node], other: list[Node], colour: str, first: int) -> list[str]:
    """A graph as rows from top to bottom, with an arc from each result to where it is used."""
    names = {node.name for node in other}
    x = LEFT + ARCS
    parts = [f'<text x="{x}" y="{first - 14}" class="head">{title}</text>']
    rows = {node.name: i for i, node in enumerate(graph)}
    for i, node in enumerate(graph):
        y = first + i * ROW
        fill = PAPER if node.name in names else colour
        name = f'<tspan class="name">{html.escape(node.name)}</tspan>'
        shape = f'<tspan class="dim" dx="14">{html.escape(node.shape)}</tspan>' if node.shape else ""
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDTH - ARCS}" height="{ROW - 6}" rx="4" fill="{fill}"/>',
            f'<text x="{x + 8}" y="{y + 16}">{name} = {html.escape(node.call)}{shape}</text>',
        ]
        for used in sorted(set(re.findall(r"\b\w+\b(?!\()", node.call)) & rows.keys()):
            start, bend = rows[used], min(ARCS + 6, 6 + 3 * (i - rows[used]))
            top, end = first + start * ROW + 18, y + 8
            path = f"M {x} {top} C {x - bend} {top}, {x - bend} {end}, {x} {end}"
            parts.append(f'<path d="{path}" marker-end="url(#tip)"/>')
    return parts


def picture(before: list[Node], after: list[Node]) -> str:
    """The two graphs, one below the other."""
    second = 2 * TOP + ROW * len(before)
    width, height = WIDTH + 2 * LEFT, second + ROW * len(after) + LEFT
    style = (
        f"text {{ font: 12px ui-monospace, Menlo, Consolas, monospace; fill: {INK} }} .name {{ font-weight: 600 }} "
        f".dim {{ fill: {DIM} }} .head {{ font: 600 15px system-ui, sans-serif }} "
        f"path {{ fill: none; stroke: {DIM} }} #tip path {{ fill: {DIM}; stroke: none }} rect {{ stroke: #d0d7de }}"
    )
    tip = '<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The graph of an attention layer before and after the pass</title>",
        f"<style>{style}</style>",
        f'<defs>{tip}<path d="M 0 0 L 6 3 L 0 6 z"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        *column("before", before, after, GONE, TOP),
        *column("after", after, before, NEW, second),
        "</svg>\n",
    ])  # fmt: skip


def main() -> int:
    """Draw."""
    before, after = (nodes(dump) for dump in dumps())
    OUT.write_text(picture(before, after))
    print(f"wrote {OUT.name}: {len(before)} nodes before, {len(after)} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
