"""``make offline``: its budgets, a sample compiled afresh, and that its table holds every case.

Whether the table belongs to this source and this Triton is tested with the other tables (`test_tables.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import offline
from benchmarks.offline_compile import Row
from benchmarks.tables import RESULTS, ROOT

SAMPLE = """
import json
from benchmarks import offline
offline.compiler_only()
wanted = [
    offline.Case("forward", "sm_90", "bfloat16", 128, 128),
    offline.Case("forward", "sm_80", "float16", 64, 64),
    offline.Case("select", "gfx942", "float32", 0, 256),
]
print(json.dumps([row for case in wanted for row in offline.rows_of(case)]))
"""
GOOD: Row = {"shared": 1000, "spill_stores": 0, "spill_loads": 0, "matrix": "wgmma.mma_async m64n128k16"}
TILE = {"BLOCK_M": 128, "BLOCK_N": 64}


def test_a_sample_compiles_within_its_budgets(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SAMPLE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) >= 3
    assert not [(row["kernel"], row["broken"]) for row in rows if row["broken"]]
    assert "wgmma" in rows[0]["matrix"]


def test_the_table_holds_every_case_and_no_broken_budget() -> None:
    rows = json.loads((RESULTS / "offline.json").read_text())["rows"]
    assert {row["kernel"].split(": ")[0] for row in rows} == {case.name for case in offline.cases()}
    assert not [row["kernel"] for row in rows if row["broken"]]


@pytest.mark.parametrize(
    ("change", "case", "message"),
    [
        ({"shared": 300_000}, ("backward", "sm_90", "float32", 256, 128), "bytes of shared memory"),
        ({"spill_stores": 3}, ("forward", "sm_80", "bfloat16", 32, 64), "3 spills"),
        ({"spill_loads": 1}, ("forward, key mask", "sm_89", "float16", 256, 128), "1 spills"),
        ({"matrix": "mma.sync"}, ("forward", "sm_90", "bfloat16", 64, 64), "instead of wgmma"),
    ],
)
def test_a_broken_budget_is_named(change: Row, case: tuple[str, str, str, int, int], message: str) -> None:
    row = {**GOOD, **change}
    assert message in "".join(offline.broken_budgets(offline.Case(*case), row, TILE))
    assert not offline.broken_budgets(offline.Case(*case), GOOD, TILE)


def test_small_tiles_break_the_budget_where_large_ones_are_wanted() -> None:
    small = {"BLOCK_M": 64, "BLOCK_N": 64}
    for D in (64, 128):
        case = offline.Case("forward", "sm_90", "bfloat16", D, 128)
        assert offline.broken_budgets(case, GOOD, small) == ["tile 64 x 64, smaller than 128 x 64"]
    assert not offline.broken_budgets(offline.Case("forward", "sm_90", "bfloat16", 128, 64), GOOD, small)


def test_spills_are_allowed_where_no_budget_forbids_them() -> None:
    row = {**GOOD, "spill_stores": 9, "spill_loads": 9}
    for case in (("forward", "sm_120", "bfloat16", 256, 128), ("backward", "sm_90", "bfloat16", 128, 128)):
        assert not offline.broken_budgets(offline.Case(*case), row, TILE)


def test_the_report_says_what_broke() -> None:
    pytest.importorskip("triton")
    row = {
        "kernel": "forward sm_90 bfloat16 D=64 block=64: forward_kernel",
        "outcome": "failed",
        "broken": ["9 spills"],
    }
    assert "| 9 spills |" in offline.markdown([row])
