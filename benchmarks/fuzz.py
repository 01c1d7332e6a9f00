"""``make fuzz``: every property test with many random examples. Resumable; writes ``benchmarks/results/fuzz.json``.

A row is one test: how many examples passed, in how many seconds. A failing test is printed and makes the command
fail; hypothesis keeps the example and tries it first the next time.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

from benchmarks.tables import ROOT, Row, Table

SOURCES = ["kernels/*.py", "kernels/*.cpp", "kernels/*.h", "tests/kernels/*.py", "tests/conftest.py", "tests/tools.py"]
PACKAGES = ["torch", "hypothesis", "numpy"]
FOLDER = "tests/kernels"


def pytest(*args: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the property tests in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "hypothesis and not gpu", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def property_tests() -> list[str]:
    """Return the ids of all property tests of the kernels."""
    listed = pytest("--collect-only", FOLDER)
    names = [line for line in listed.stdout.splitlines() if line.startswith(FOLDER) and "::" in line]
    if listed.returncode not in (0, 5) or not names:
        sys.exit(f"no property tests found:\n{listed.stdout}{listed.stderr}")
    return names


def fuzz(test: str) -> tuple[Row, str]:
    """Run one test with the ``fuzz`` profile; returns its row and what pytest printed."""
    start = time.perf_counter()
    done = pytest("--hypothesis-profile=fuzz", "--hypothesis-show-statistics", test)
    passed = sum(int(count) for count in re.findall(r"(\d+) passing", done.stdout))
    outcome = "passed" if done.returncode == 0 and passed else "failed"
    return {
        "test": test,
        "outcome": outcome,
        "examples": passed,
        "seconds": round(time.perf_counter() - start),
    }, done.stdout


def main() -> int:
    """Run what has no current row yet. Returns 0 where every test has passed."""
    tests = property_tests()
    table = Table("fuzz", command="make fuzz", sources=SOURCES, packages=PACKAGES, key="test")
    table.keep_only(tests)
    for number, test in enumerate(tests, 1):
        row = table.rows.get(test)
        if row is None or row["outcome"] != "passed":
            row, printed = fuzz(test)
            table.put(row)
            if row["outcome"] != "passed":
                print(printed)
        print(
            f"{number}/{len(tests)} {test}: {row['outcome']}, {row['examples']} examples, {row['seconds']} s",
            flush=True,
        )
    failed = [row["test"] for row in table.rows.values() if row["outcome"] != "passed"]
    print(f"{len(tests) - len(failed)} of {len(tests)} property tests passed; {table.path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
