"""Random numbers: functions of their key alone, equal for every split over ranks, independent between keys."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from blade_compile.distill import randomness

SAMPLES = range(512)


def test_a_generator_depends_on_every_part_of_its_key_and_on_its_type() -> None:
    keys: list[tuple[int | str, ...]] = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 1), (0, 11), (0, "1", "1"), (0, "11")]
    draws = {torch.rand(1, generator=randomness.generator(0, *key)).item() for key in keys}
    assert len(draws) == len(keys)
    again = torch.rand(4, generator=randomness.generator(0, "noise", 3))
    assert torch.equal(again, torch.rand(4, generator=randomness.generator(0, "noise", 3)))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7)], ids=str)
def test_two_ranks_draw_what_one_draws(shape: tuple[int, ...]) -> None:
    samples = list(range(8))
    together = [
        randomness.normal(shape, 5, 7, samples, "z"),
        randomness.uniform(5, 7, samples, "z"),
        randomness.integers(1000, 5, 7, samples, "z"),
    ]
    assert together[0].shape == (8, *shape)
    assert [drawn.dtype for drawn in together] == [torch.float32, torch.float64, torch.int64]
    for rank in range(2):
        mine = samples[rank::2]
        apart = [
            randomness.normal(shape, 5, 7, mine, "z"),
            randomness.uniform(5, 7, mine, "z"),
            randomness.integers(1000, 5, 7, mine, "z"),
        ]
        for whole, part in zip(together, apart, strict=True):
            assert torch.equal(whole[rank::2], part)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = randomness.normal((4,), 0, 0, [0], "z")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(randomness.normal((4,), 0, 0, [0], "z"), first)


@pytest.mark.parametrize("changed", ["seed", "step", "samples", "purpose"])
def test_every_part_of_a_sample_s_key_gives_independent_numbers(changed: str) -> None:
    key: dict[str, Any] = {"seed": 0, "step": 3, "samples": SAMPLES, "purpose": "noise"}
    other = key | {changed: {"seed": 1, "step": 4, "samples": range(512, 1024), "purpose": "tau"}[changed]}
    a, b = randomness.normal((64,), **key), randomness.normal((64,), **other)
    pairs = torch.stack((a.flatten(), b.flatten()))
    assert torch.corrcoef(pairs)[0, 1].abs() < 5 / a.numel() ** 0.5
    a, b = randomness.uniform(**key), randomness.uniform(**other)
    assert torch.corrcoef(torch.stack((a, b)))[0, 1].abs() < 5 / len(a) ** 0.5


def test_samples_are_independent_of_each_other() -> None:
    noise = randomness.normal((256,), 0, 0, SAMPLES, "noise")
    correlation = torch.corrcoef(noise)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 256**0.5  # of 130000 pairs, each with a deviation of 1 / 16
    assert correlation.square().mean().sqrt() == pytest.approx(1 / 16, rel=0.02)


def test_moments_of_normal_numbers() -> None:
    noise = randomness.normal((256,), 0, 0, SAMPLES, "noise").double()
    count = noise.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(noise.pow(power).mean() - moment) < 5 * (variance / count) ** 0.5
    across = noise.mean(0)  # the first draws of many generators are as random as many draws of one
    assert across.std() == pytest.approx(len(SAMPLES) ** -0.5, rel=0.2)


def test_uniform_numbers_and_integers_fill_their_range_evenly() -> None:
    samples = range(4096)
    drawn = randomness.uniform(0, 0, samples, "tau")
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 5 * (1 / 12 / len(samples)) ** 0.5
    for values, bins in [((drawn * 8).long(), 8), (randomness.integers(5, 0, 0, samples, "i"), 5)]:
        counts = torch.bincount(values)
        expected = len(samples) / bins
        assert len(counts) == bins
        assert ((counts - expected) ** 2 / expected).sum() < 30  # chi^2 of 7 or 4 degrees of freedom


def test_a_choice_is_one_of_the_options_and_all_come_up() -> None:
    counts = Counter(randomness.choice([1, 2, 4, 8], 0, step, "steps") for step in range(400))
    assert set(counts) == {1, 2, 4, 8} and min(counts.values()) > 60


def test_no_samples_give_empty_tensors() -> None:
    assert randomness.normal((3,), 0, 0, [], "z").shape == (0, 3)
    assert randomness.uniform(0, 0, [], "z").shape == randomness.integers(4, 0, 0, [], "z").shape == (0,)


def test_each_epoch_holds_each_prompt_once_in_an_order_of_its_own() -> None:
    epochs = [[randomness.prompt_of(3, 50, 50 * epoch + place) for place in range(50)] for epoch in range(3)]
    for epoch, prompts in enumerate(epochs):
        assert sorted(prompts) == list(range(50))
        assert prompts == randomness.order(50, 3, epoch).tolist()
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert randomness.order(50, 4, 0).tolist() != epochs[0]


def test_an_order_that_a_caller_changes_stays_as_it_was() -> None:
    randomness.order(10, 0, 0).zero_()
    assert sorted(randomness.order(10, 0, 0).tolist()) == list(range(10))
