"""``make offline``: every shipped configuration of every Triton kernel compiled for every chip, without a GPU.

    python -m benchmarks.offline [--jobs 2] [--only TEXT]

Writes ``benchmarks/results/offline.json`` and ``offline.md``: registers, shared memory, stack, spills and the matrix
instruction of each kernel. Resumable. Ends with 1 where a kernel breaks a budget:

- forward in fp16 and bf16 on sm_80, sm_89 and sm_90: no spills
- everywhere: shared memory within the chip's limit
- forward in fp16 and bf16 on sm_90: ``wgmma``, and for head dims 64 and 128 one product of at least 64 x 64 per warp
  group in a tile of at least 128 x 64
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention_report import table
from benchmarks.offline_compile import CHIPS, Chip, Launch, Row, compiled, recorded, resources
from benchmarks.tables import ROOT, Table

SOURCES = ["kernels/triton_*.py", "kernels/triton_configs.json", "benchmarks/offline*.py"]
# tf32: fp32 tensors whose matrices are multiplied by tensor cores, as torch.set_float32_matmul_precision("high") asks.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
DIMS, BLOCKS = (32, 64, 128, 256), (64, 128)
NO_SPILLS_ON = ("sm_80", "sm_89", "sm_90")


@dataclass(frozen=True)
class Case:
    """One launcher at one chip, dtype, head dim and block size."""

    kind: str
    chip: str
    dtype: str
    D: int
    block: int

    @property
    def name(self) -> str:
        """The case in words; the rows of its kernels begin with it."""
        return f"{self.kind} {self.chip} {self.dtype} D={self.D} block={self.block}"


def cases() -> Iterator[Case]:
    """Everything that is shipped: tiles depend on the dtype's width, and fp16 is compiled where a budget names it."""
    wanted = {
        "forward": (DTYPES, BLOCKS),
        "forward, key mask": (("bfloat16",), BLOCKS),
        "forward, global tokens": (("bfloat16",), BLOCKS),
        "backward": (("bfloat16", "float32"), BLOCKS),
        "probe": (("bfloat16", "float32"), (128,)),
        "search": (("bfloat16",), BLOCKS),
    }
    for kind, (dtypes, blocks) in wanted.items():
        for chip in CHIPS:
            for dtype in dtypes:
                yield from (Case(kind, chip, dtype, D, block) for D in DIMS for block in blocks)
    # Selection works on maps: the case's block is the number of key blocks, its dtype and head dim mean nothing.
    yield from (Case("select", chip, "float32", 0, nK) for chip in CHIPS for nK in (256, 2048))


def _tensors(c: Case) -> tuple[Tensor, ...]:
    """q, k, v, num, idx on the meta device, in the sizes of a video model: ragged, as projections leave them."""
    B, H, S = 1, 12, 32_760
    n = -(-S // c.block)
    made = [torch.empty(B, S, H, c.D, dtype=DTYPES[c.dtype], device="meta").transpose(1, 2) for _ in range(3)]
    num = torch.empty(B, H, n, dtype=torch.int32, device="meta")
    return (*made, num, torch.empty(B, H, n, n, dtype=torch.int32, device="meta"))


def _bias(q: Tensor) -> Tensor:
    return torch.empty(1, 1, q.shape[2], device="meta")


def _forward(c: Case, *, masked: bool = False, pooled: bool = False) -> None:
    from blade_compile.kernels import triton_forward

    q, k, v, num, idx = _tensors(c)
    extra: dict[str, Tensor] = {}
    if pooled:  # one key for each block, which stands for so many tokens
        extra = {"global_k": k[:, :, : num.shape[2]], "global_v": v[:, :, : num.shape[2]]}
        extra["global_bias"] = torch.empty(num.shape[2], device="meta")
    triton_forward.attention_forward(q, k, v, num, idx, _bias(q) if masked else None, c.D**-0.5, c.block, **extra)


def _backward(c: Case) -> None:
    from blade_compile.kernels import triton_backward

    q, k, v, num, idx = _tensors(c)
    lse = torch.empty(q.shape[:3], device="meta")
    triton_backward.attention_backward(q, lse, q, k, v, q, lse, num, idx, None, c.D**-0.5, c.block)


def _probe(c: Case) -> None:
    from blade_compile.kernels import triton_probe

    q, k, *_ = _tensors(c)
    triton_probe.probe_map(q, k, None, c.D**-0.5, c.block, 16, 0)


def _select(c: Case) -> None:
    from blade_compile.kernels import triton_select

    block_map = torch.empty(1, 12, 256, c.block, device="meta")
    triton_select.select(block_map, None, 0.95, 0.05, 1.0, None, None)


def _search(c: Case) -> None:
    from blade_compile.kernels import triton_search

    q, k, *_ = _tensors(c)
    active = torch.empty(q.shape[0], dtype=torch.int32, device="meta")
    triton_search.block_sums(q, k, torch.empty(q.shape[:3], device="meta"), None, c.D**-0.5, c.block, active)


LAUNCHERS: dict[str, Callable[[Case], None]] = {
    "forward": _forward,
    "forward, key mask": functools.partial(_forward, masked=True),
    "forward, global tokens": functools.partial(_forward, pooled=True),
    "backward": _backward,
    "probe": _probe,
    "search": _search,
    "select": _select,
}


@contextlib.contextmanager
def _as_if_on(chip: Chip) -> Iterator[None]:
    """The launchers take their tiles for a chip."""
    from blade_compile.kernels import triton_configs

    triton_configs.forget()
    with mock.patch.object(triton_configs, "family", return_value=chip.name):
        yield


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(c: Case) -> list[Launch]:
    """What a launcher launches for a case, as if the chip were there."""
    with _as_if_on(CHIPS[c.chip]), _precision(c.dtype), recorded() as found:
        LAUNCHERS[c.kind](c)
    return found


def rows_of(c: Case) -> list[Row]:
    """One row for each kernel of a case: its tile, its resources, and which budgets it breaks."""
    chip, rows = CHIPS[c.chip], []
    for launch in launches(c):
        used = resources(compiled(launch, chip), chip)
        tile = {name: launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N") if name in launch.arguments}
        row = {
            "kernel": f"{c.name}: {launch.name}",
            "tile": " x ".join(map(str, tile.values())),
            "warps": launch.options.get("num_warps", 4),
            "stages": launch.options.get("num_stages", 3),
            **used,
        }
        broken = broken_budgets(c, row, tile)
        rows.append({**row, "outcome": "failed" if broken else "passed", "broken": broken})
    return rows


def broken_budgets(c: Case, row: Row, tile: dict[str, int]) -> list[str]:
    """What a kernel may not do, and does."""
    broken = []
    if row["shared"] > CHIPS[c.chip].shared:
        broken.append(f"{row['shared']} bytes of shared memory, {CHIPS[c.chip].shared} are there")
    if c.kind.startswith("forward") and c.dtype in ("float16", "bfloat16"):
        spills = row["spill_stores"] + row["spill_loads"]
        if c.chip in NO_SPILLS_ON and spills:
            broken.append(f"{spills} spills")
        if c.chip == "sm_90" and not row["matrix"].startswith("wgmma"):
            broken.append(f"{row['matrix']} instead of wgmma")
        if c.chip == "sm_90" and c.D in (64, 128) and c.block == 128 and tile["BLOCK_M"] * tile["BLOCK_N"] < 128 * 64:
            broken.append(f"tile {tile['BLOCK_M']} x {tile['BLOCK_N']}, smaller than 128 x 64")
    return broken


def _checked_rows(c: Case) -> list[Row]:
    """`rows_of`, with a failed row where a case can't be compiled at all."""
    try:
        return rows_of(c)
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises is the result)
        return [{"kernel": f"{c.name}: ?", "outcome": "failed", "broken": [f"{type(error).__name__}: {error}"[:300]]}]


def new_table() -> Table:
    """The committed table, as far as it is current."""
    return Table("offline", command="make offline", sources=SOURCES, packages=["triton"], key="kernel")


def markdown(rows: list[Row]) -> str:
    """One table for each kind of kernel."""
    import triton

    lines = [
        "# Triton kernels compiled for chips that aren't there",
        "",
        f"Triton {triton.__version__}; made by `make offline`. Shared memory and stack in bytes; spills are stores and",
        "loads of local memory in the machine code (gfx942: vector and scalar registers).",
        "",
    ]
    head = ("kernel", "tile", "warps", "stages", "registers", "shared", "stack", "spills", "matrix", "budget")
    for kind in dict.fromkeys(row["kernel"].split(" sm_")[0].split(" gfx")[0] for row in rows):
        found = [row for row in rows if row["kernel"].startswith((f"{kind} sm_", f"{kind} gfx"))]
        lines += [f"## {kind.capitalize()}", "", *table(head, map(_cells, found)), ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[Any]:
    spills = f"{row['spill_stores']} + {row['spill_loads']}" if row.get("spill_stores") or row.get("spill_loads") else 0
    numbers = [row.get(name, "") for name in ("tile", "warps", "stages", "registers", "shared", "stack")]
    return [row["kernel"], *numbers, spills, row.get("matrix", ""), "; ".join(row["broken"]) or "kept"]


def main(argv: list[str] | None = None) -> int:
    """Compile what has no current row yet. Returns 1 where a budget is broken."""
    parser = argparse.ArgumentParser(prog="make offline", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes (default: 2)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args(argv)
    compiler_only()
    result, wanted = new_table(), list(cases())
    done = {name.split(": ")[0] for name, row in result.rows.items() if row["outcome"] == "passed"}
    result.keep_only([name for name in result.rows if name.split(": ")[0] in {c.name for c in wanted}])
    todo = [c for c in wanted if c.name not in done and args.only in c.name]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), compiler_only) as pool:
        for number, (c, rows) in enumerate(zip(todo, pool.map(_checked_rows, todo), strict=True), 1):
            result.keep_only([name for name in result.rows if name.split(": ")[0] != c.name])
            for row in rows:
                result.put(row)
                if row["broken"]:
                    print(f"{row['kernel']}: {'; '.join(row['broken'])}", flush=True)
            if number % 20 == 0:
                print(f"{number} of {len(todo)} cases", flush=True)
    rows = [result.rows[name] for name in sorted(result.rows)]
    result.path.with_suffix(".md").write_text(markdown(rows))
    failed = sum(row["outcome"] == "failed" for row in rows)
    missing = len(wanted) - len({row["kernel"].split(": ")[0] for row in rows})
    print(f"{len(rows)} kernels, {failed} break a budget, {missing} cases left; {result.path.relative_to(ROOT)}")
    return int(failed > 0 or missing > 0)


def compiler_only() -> None:
    """Triton's compiler instead of its interpreter, with its cache in the checkout."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache/triton"))


if __name__ == "__main__":
    sys.exit(main())
