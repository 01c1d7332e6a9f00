"""What belongs together in a plot."""

from __future__ import annotations

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
