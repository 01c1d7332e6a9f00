"""The cost model: complete table, sane shapes of its predictions, and choices that follow from them."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy

from blade_compile.kernels import cost, cpu_build

FAMILIES = [f"cpu-{isa}" for isa in cpu_build.ISA_FLAGS] + ["cpu-aten"]
UNMEASURED = ("accelerator-aten", "cpu-amx", "cpu-arm")
DTYPES = ("float32", "bfloat16", "float16")
SIZES = {"B": 1, "H": 8, "S": 8192, "T": 8192, "D": 128, "block": 128, "probe": 16}


def test_the_shipped_table_is_complete_and_says_where_it_is_from() -> None:
    table = cost.table()
    assert set(table) == {*FAMILIES, *UNMEASURED}
    cost._check({name: entry for name, entry in table.items() if entry["constants"]})
    for family in FAMILIES:
        assert set(table[family]["constants"]) >= set(DTYPES)
        assert table[family]["date"]
        assert "torch" in table[family]["setup"]
    assert "float64" in table["cpu-aten"]["constants"]
    assert all("not measured" in table[family]["setup"] and not cost.measured(family) for family in UNMEASURED)


def test_expressions_are_linear_in_their_constants() -> None:
    for expression in cost.expressions().values():
        for name in cost.CONSTANTS:
            constant = sympy.Symbol(name, positive=True)
            assert constant not in sympy.diff(expression, constant).free_symbols


@pytest.mark.parametrize(("family", "dtype"), list(itertools.product(FAMILIES, DTYPES)))
def test_predictions_grow_with_the_work(family: str, dtype: str) -> None:
    cost_of = lambda what, density=1.0, **other: cost.seconds(  # noqa: E731
        family, dtype, what, **{**SIZES, **other}, density=density
    )
    for what in ("dense", "attention", "predict"):
        assert cost_of(what) > 0
        assert cost_of(what, S=16384) > cost_of(what)
        assert cost_of(what, H=16) == pytest.approx(2 * cost_of(what), rel=0.01)
    assert cost_of("attention", 0.2) < 0.3 * cost_of("attention")
    assert cost_of("predict") < cost_of("dense")


@pytest.mark.parametrize(("family", "dtype"), list(itertools.product(FAMILIES[:2], DTYPES)))
def test_long_sparse_attention_is_chosen(family: str, dtype: str) -> None:
    sizes = (1, 8, 8192, 8192, 128, 128)
    assert cost.choose(family, dtype, sizes, 16, 0.2) == "sparse"
    assert cost.choose(family, dtype, sizes, 16, 1.0) in {"full", "sdpa"}
    length = cost.crossover_length(family, dtype, H=8, D=128, block=128, probe=16, density=0.2)
    assert length is not None
    assert length <= 2048
    assert cost.choose(family, dtype, (1, 8, length, length, 128, 128), 16, 0.2) == "sparse"


def test_what_was_never_measured_stays_with_sdpa() -> None:
    assert math.isnan(cost.seconds("accelerator-aten", "bfloat16", "dense", **SIZES, density=1.0))
    assert cost.choose("accelerator-aten", "bfloat16", (1, 8, 65536, 65536, 128, 128), 16, 0.05) == "sdpa"
    assert cost.crossover_length("accelerator-aten", "bfloat16", H=8, D=128, block=128, probe=16, density=0.1) is None


def test_a_fit_that_is_far_off_needs_a_larger_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (1, 8, 8192, 8192, 128, 128)
    table = {name: {**entry, "margin": {"float32": 0.001}} for name, entry in cost.table().items()}
    cost.choose.cache_clear()
    monkeypatch.setattr(cost, "table", lambda: table)
    assert cost.choose("cpu-avx512", "float32", sizes, 16, 0.2) == "sdpa"
    cost.choose.cache_clear()
