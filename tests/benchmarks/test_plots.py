"""What belongs together in a plot."""

from __future__ import annotations

import re

from benchmarks import plots

SPAN = {"median": 4.0, "low": 3.5, "high": 4.5, "samples": 5}


def test_fidelity_and_speed_are_paired_where_both_kept_as_much() -> None:
    def pair(policy: str, arm: str, timed: float, compared: float) -> list[plots.Row]:
        common = {"policy": policy, "sparsity": 0.8, "status": "ok"}
        row = {**common, "suite": "ops", "kind": "policies", "arm": arm, "density": timed, "speedup": SPAN}
        return [row, {**common, "suite": "fidelity", "arm": "x", "density": compared, "l1": 0.3}]

    rows = [
        *pair("asa", "blade asa, sparsity 0.8", 0.2, 0.25),
        *pair("sparge", "blade sparge, sparsity 0.8", 1.0, 0.64),
        *pair("adaspa", "blade adaspa, search at every call, sparsity 0.8", 0.2, 0.2),
    ]
    chosen = plots.select_fidelity(rows)
    assert [row["policy"] for row in chosen] == ["asa", "asa", "adaspa", "adaspa"]
    svg = plots.draw_fidelity(chosen)
    assert "adaspa, search at every call<" in svg
    assert "sparge" not in svg


def test_a_long_legend_leaves_the_plot_its_height() -> None:
    def height(models: int) -> float:
        row = {"suite": "models", "density": 0.2, "speedup": SPAN, "error": 0.1}
        found = re.search(
            r'viewBox="0 0 \S+ (\S+)"', plots.draw_distance([row | {"model": str(m)} for m in range(models)])
        )
        assert found
        return float(found[1])

    assert height(2) < height(4) < height(8)
