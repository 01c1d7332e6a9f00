"""Which tokens of a joint sequence are not image or video: the ranges that ``protect="auto"`` never drops.

A diffusion transformer with joint attention concatenates text (or class and register tokens) with the image. The
concatenation is in the graph, so the parts are known: the longest is the image, equally long ones too (frames, tiles),
the others are protected. Two kinds of evidence overrule length: a part whose inputs are named like text is protected
even when it is the longest (512 text tokens beside a 256-token image), and a part of the keys that is made of the image
part of the queries is image (keys = long cache + new chunk).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from blade_compile.passes.extents import Count, Extent

if TYPE_CHECKING:
    from blade_compile.passes.lineage import Leaf, Lineage, Segment, Segments

_TEXT = re.compile(
    r"(encoder_hidden_state|text|txt|prompt|caption|cap_feat|context|ctx|cls|class_tok|register|reg_tok|byt5|llama|t5)",
    re.IGNORECASE,
)


class Part(NamedTuple):
    """Tokens ``start .. start + length``; ints, or SymInts over the symbols of the graph's shapes."""

    start: Count
    length: Count


def is_text(segment: Segment, lineage: Lineage) -> bool:
    """Whether every graph input that a part is made of is named like text, class or register tokens."""
    inputs = [leaf.node for leaf in segment.leaves if leaf.node.op in ("placeholder", "get_attr")]
    data = [node for node in inputs if lineage.is_data(node)]
    names = [lineage.name(node) for node in data or inputs]
    return bool(names) and all(_TEXT.search(name) for name in names)


def image_leaves(segments: Segments, lineage: Lineage) -> frozenset[Leaf]:
    """The leaves of the image parts."""
    chosen = _image_parts(segments, lineage, frozenset())
    return frozenset().union(*(s.leaves for s, image in zip(segments, chosen) if image))


def protected(segments: Segments, lineage: Lineage, image: frozenset[Leaf] = frozenset()) -> tuple[Part, ...]:
    """The ranges that are not image, adjacent ones merged. image: leaves known to be image from the other side."""
    chosen = _image_parts(segments, lineage, image)
    out: list[tuple[Extent, Extent]] = []
    start = Extent(0)
    open_range = False
    for segment, is_image in zip(segments, chosen):
        if not is_image and open_range:
            out[-1] = (out[-1][0], out[-1][1] + segment.length)
        elif not is_image:
            out.append((start, segment.length))
        open_range = not is_image
        start = start + segment.length
    return tuple(Part(first.value, length.value) for first, length in out)


def _counted_at_run_time(segment: Segment) -> bool:
    """Whether the length depends on data (the valid tokens of a padded prompt): its hint means nothing."""
    value = segment.length.value
    return not isinstance(value, int) and bool(free_unbacked_symbols(value))


def _image_parts(segments: Segments, lineage: Lineage, image: frozenset[Leaf]) -> list[bool]:
    if len(segments) < 2:
        return [True] * len(segments)
    text = [is_text(segment, lineage) or _counted_at_run_time(segment) for segment in segments]
    if all(text):
        text = [False] * len(segments)
    lengths = [segment.length.hint for segment in segments]
    known = [bool(image & segment.leaves) and not t for segment, t in zip(segments, text)]
    longest = max(n for n, t in zip(lengths, text) if not t)
    bar = min(n for n, k in zip(lengths, known) if k) if any(known) else longest
    return [k or (not t and n >= bar) for n, t, k in zip(lengths, text, known)]
