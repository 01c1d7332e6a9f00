"""What `explain` hands back: one row per attention site, a headline, notes; as a table, as a dictionary."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Range = tuple[int, int]


@dataclass(kw_only=True)
class Site:
    """One attention site: what it is, what was decided and why, and what it did in the run that was observed.

    Times are in seconds and belong to one call; None where there is nothing to say.
    """

    name: str
    "module path; several calls in one module are told apart by #1, #2"
    kind: str
    "how it is written: ``sdpa``, ``matmul``, ``mha``, ``flex``, ..."
    rewritten: bool
    "whether the graph calls the block-sparse operator here"
    code: str
    "stable short word: ``rewritten``, or why not (passes/codes.py, and RUN_CODES below)"
    reason: str
    "the code as a sentence"
    shape: tuple[int | None, ...] = (None,) * 5
    "(B, H, S, T, D): batch, heads, query tokens, key tokens, head dimension"
    dtype: str | None = None
    mask: str = "none"
    "``none``, ``key`` (honoured exactly), or what kept it dense"
    protected_q: tuple[Range, ...] = ()
    protected_k: tuple[Range, ...] = ()
    "(start, length) of the tokens that are never dropped, as queries and as keys"
    block_size: int | None = None
    calls: int = 1
    "times that it ran in one call of the model"
    ran: str | None = None
    "what computed it: ``cpu-<instruction set>``, ``aten``, ``sdpa`` (predicted to be as fast); None: not our operators"
    density: float | None = None
    "kept share of the blocks as counted from the lists, mean over the calls; None if it did not run block-sparse"
    recall: float | None = None
    "share of the exact softmax mass that lies on kept blocks, on a sample of query rows"
    predicted_dense: float | None = None
    predicted_sparse: float | None = None
    "cost model: SDPA, and probe + selection + block attention at this density"
    measured_dense: float | None = None
    measured_sparse: float | None = None
    "paired, alternating, median (``blade_measure=True``)"

    @property
    def path(self) -> str:
        """The module path without the call's number."""
        return self.name.split("#", maxsplit=1)[0]

    @property
    def sparse(self) -> bool:
        """Whether it left out any block."""
        return self.density is not None and self.density < 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: ``json.dumps`` takes it."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


# Codes that only `explain` gives; those decided in the graph are in passes/codes.py.
RUN_CODES = {
    "outside-graph": "ran outside every compiled graph",
    "other-backend": "the library's attention backend is not the native one",
    "unreadable": "blade could not read the graph or the call",
    "disabled": "BLADE_DISABLE=1 turns every rewrite off",
}


@dataclass
class Report:
    """The attention sites of a model, in the order in which they ran."""

    sites: list[Site]
    notes: list[str] = field(default_factory=list)
    "what concerns the model as a whole: warnings, and what to do about them"
    options: dict[str, Any] = field(default_factory=dict)
    "blade's options in force, where they differ from the defaults"

    @property
    def headline(self) -> str:
        """``24 of 48 attention sites run sparse; 24 stay dense: 24 cross``."""
        if not self.sites:
            return "no attention was found"
        of, run = (
            ("1 attention site", "runs") if len(self.sites) == 1 else (f"{len(self.sites)} attention sites", "run")
        )
        text = f"{sum(site.sparse for site in self.sites)} of {of} {run} sparse"
        full = sum(site.density == 1 for site in self.sites)
        if full:
            text += f"; {full} {'keeps' if full == 1 else 'keep'} every block"
        dense = Counter(site.code for site in self.sites if site.density is None)
        if dense:
            number = sum(dense.values())
            why = ", ".join(f"{n} {code}" for code, n in dense.most_common())
            text += f"; {number} {'stays' if number == 1 else 'stay'} dense: {why}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that ``json.dumps`` takes."""
        return {
            "headline": self.headline,
            "notes": list(self.notes),
            "options": _plain(self.options),
            "sites": [site.to_dict() for site in self.sites],
        }

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        """A table: with colours on a terminal, plain text elsewhere."""
        if not sys.stdout.isatty():
            return self.plain()
        from rich.console import Console

        text = io.StringIO()
        width = shutil.get_terminal_size((120, 40)).columns
        Console(file=text, force_terminal=True, width=width).print(self)
        return text.getvalue().rstrip("\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        """For ``rich.print`` and consoles of one's own."""
        from rich.table import Table
        from rich.text import Text

        yield Text(self.headline, style="bold")
        for note in self.notes:
            yield Text(f"! {note}", style="yellow")
        if not self.sites:
            return
        header, rows = self._cells()
        table = Table(show_edge=False, pad_edge=False)
        for title in header:
            table.add_column(title, overflow="fold", no_wrap=title not in {"site", "reason"})
        for (group, _), row in zip(_grouped(self.sites), rows, strict=True):
            table.add_row(*map(Text, row), style="green" if group.sparse else "dim")
        yield table

    def plain(self) -> str:
        """The table without colours and box characters: the same lines on every machine."""
        lines = [self.headline, *(f"! {note}" for note in self.notes)]
        if self.sites:
            header, rows = self._cells()
            widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
            lines.append("")
            underline = ["-" * width for width in widths]
            pad = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))  # noqa: E731
            lines += [pad(row).rstrip() for row in (header, underline, *rows)]
        return "\n".join(lines)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text; a column that would be empty throughout is left out."""
        header = [
            "site",
            "n",
            "kind",
            "B x H x S x D",
            "mask",
            "protected",
            "decision",
            "density",
            "recall",
            "predicted ms",
            "measured ms",
            "reason",
        ]
        rows = [_row(first, members) for first, members in _grouped(self.sites)]
        used = [i for i in range(len(header)) if any(row[i] for row in rows)]
        return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _grouped(sites: list[Site]) -> list[tuple[Site, list[Site]]]:
    """Sites that differ in their layer's number alone, together: a table of 120 equal rows helps nobody."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        reason = re.sub(r"\d+", "*", site.reason)
        key = (
            re.sub(r"\d+", "*", site.name),
            site.kind,
            site.code,
            reason,
            site.shape,
            site.mask,
            site.protected_k,
            site.ran,
        )
        groups.setdefault(key, []).append(site)
    return [(members[0], members) for members in groups.values()]


def _row(first: Site, members: list[Site]) -> list[str]:
    return [
        _names([site.name for site in members]),
        str(sum(site.calls for site in members)),
        first.kind,
        _shape(first.shape),
        "" if first.mask == "none" else first.mask,
        _tokens(first.protected_k or first.protected_q),
        _decision(first),
        _spread([site.density for site in members]),
        _spread([site.recall for site in members]),
        _times(members, "predicted"),
        _times(members, "measured"),
        first.reason.partition("; ")[2] if first.sparse else first.reason,  # of a sparse site only what is remarkable
    ]


def _names(names: list[str]) -> str:
    """``blocks.{0-29}.attn1`` for a run of layers."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(p) for p in parts}) > 1:
        return f"{names[0]} ... {names[-1]}"
    merged = []
    for column in zip(*parts, strict=True):
        values = list(dict.fromkeys(column))
        merged.append(values[0] if len(values) == 1 else "{" + _runs(sorted(int(v) for v in values)) + "}")
    return "".join(merged)


def _runs(numbers: list[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shape(shape: tuple[int | None, ...]) -> str:
    if all(size is None for size in shape):
        return ""
    B, H, S, T, D = ("?" if size is None else str(size) for size in shape)
    return f"{B}x{H}x{S}x{D}" if S == T else f"{B}x{H}x{S}/{T}x{D}"


def _tokens(ranges: tuple[Range, ...]) -> str:
    return ", ".join(f"{start}+{length}" for start, length in ranges)


def _decision(site: Site) -> str:
    if site.density is not None:
        return f"{'sparse' if site.sparse else 'all blocks'} ({site.ran})"
    return f"dense: {site.code}"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low}-{high}"


def _times(members: list[Site], which: str) -> str:
    """``12.1 -> 1.9``: dense and sparse, mean of the group; dense alone where sparse was never an option."""
    texts = []
    for what in ("dense", "sparse"):
        known = [value for site in members if (value := getattr(site, f"{which}_{what}")) is not None]
        if known:
            texts.append(f"{1e3 * sum(known) / len(known):.3g}")
    return " -> ".join(texts)
