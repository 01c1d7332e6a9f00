"""Every setting refuses what it can't mean, and says what is valid."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blade_compile.backend import split_options
from blade_compile.config import BladeConfig
from blade_compile.errors import BladeOptionError


def test_defaults_are_the_contracts() -> None:
    config = BladeConfig()
    assert (config.policy, config.sparsity, config.tau, config.min_keep, config.max_keep) == (
        "asa",
        None,
        0.95,
        0.05,
        1.0,
    )
    assert (config.block, config.probe_tokens, config.seed, config.min_tokens) == (128, 16, 0, 2048)
    assert (config.order, config.grid, config.protect, config.when) == ("none", None, "auto", "auto")


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BladeConfig().sparsity = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        BladeConfig("asa")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0; valid is a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": "0.5"}, "sparsity"),
        ({"sparsity": True}, "sparsity"),
        ({"block_size": 64.0}, "block_size=64.0"),
        ({"inline_kernels": 1}, "inline_kernels=1; valid are True and False"),
        ({"protect": ((0, 1.5),)}, "protect"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"tau": 0.0}, r"\(0, 1\]"),
        ({"tau": 1.5}, "tau"),
        ({"min_keep": 0.5, "max_keep": 0.2}, "min_keep=0.5 is above"),
        ({"sparsity": 0.5, "tau": 0.9}, "one or the other"),
        ({"sparsity": 0.5, "max_keep": 0.9}, "max_keep"),
        ({"block_size": 100}, "16, 32, 64, 128"),
        ({"probe_tokens": 0}, "from 1 to 128"),
        ({"probe_tokens": 32, "block_size": 16}, "from 1 to 16"),
        ({"seed": -1}, "seed"),
        ({"policy": "best"}, "'asa'"),
        ({"when": "sometimes"}, "'auto', 'always', 'never'"),
        ({"protect": ((1, 2, 3),)}, "ranges"),
        ({"protect": "text"}, "ranges"),
        ({"include": 5}, "module-path"),
        ({"order": "hilbert"}, "'none', 'gilbert', 'tile'"),
        ({"grid": (2, 3)}, r"grid=\(2, 3\); valid are three positive integers"),
        ({"grid": (2, 3, 0)}, "grid"),
        ({"preset": "wan"}, "valid are 'wan2.1-1.3b'"),
        ({"preset": ["wan"]}, "valid are 'wan2.1-1.3b'"),
        ({"probe": "max"}, "'sample', 'mean'"),
        ({"policy": "adaspa", "tau": 0.9}, "give sparsity instead of tau"),
        ({"dense_steps": -1}, "integer from 0"),
        ({"search_steps": 10}, "ascending steps"),
        ({"search_steps": (3, 3)}, "ascending integers from 1"),
        ({"search_steps": ()}, "search_steps is empty"),
        ({"sparsity_steps": ((0, 0.5),)}, "ascending"),
        ({"sparsity_steps": ((1, 1.5),)}, "sparsity_steps"),
        ({"sparsity_steps": (1, 2)}, r"\(step, sparsity\) pairs"),
        ({"drift": 0}, "drift"),
        ({"policy": "xattention", "stride": 48}, "stride=48 doesn't divide block_size"),
        ({"head_adaptive": 1}, "True and False"),
        ({"calibration": 3}, "path of a calibration file"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BladeConfig(**options)  # type: ignore[arg-type]


def test_lists_become_tuples_so_that_a_config_can_be_a_key() -> None:
    config = BladeConfig(include=["a.*"], exclude="b", protect=[[0, 4]])  # type: ignore[arg-type]
    assert (config.include, config.exclude, config.protect) == (("a.*",), ("b",), ((0, 4),))
    hash(config)


def test_options_are_split_by_who_knows_them() -> None:
    config, inductor = split_options(None, {"sparsity": 0.8, "max_autotune": True, "triton.cudagraphs": False})
    assert config.sparsity == 0.8 and inductor == {"max_autotune": True, "triton.cudagraphs": False}


def test_mode_may_come_either_way() -> None:
    want = torch._inductor.list_mode_options("max-autotune")
    for got in (split_options("max-autotune", None)[1], split_options(None, {"mode": "max-autotune"})[1]):
        assert got.items() >= want.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.8}, "did you mean 'sparsity'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"sparsity": 3}, r"\[0, 1\)"),
        ({"max_autotune": "yes"}, "max_autotune"),
    ],
    ids=str,
)
def test_first_call_names_what_is_wrong(options: dict[str, object], message: str) -> None:
    model = torch.compile(torch.nn.Linear(2, 2), backend="blade", options=options)
    with pytest.raises(ValueError, match=message) as caught:
        model(torch.ones(1, 2))
    assert isinstance(caught.value, BladeOptionError)


def test_unknown_mode_is_refused() -> None:
    model = torch.compile(torch.nn.Linear(2, 2), backend="blade", options={"mode": "fastest"})
    with pytest.raises(ValueError, match="fastest"):
        model(torch.ones(1, 2))
