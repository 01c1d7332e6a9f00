"""Clips of moving digits: splits, motion by hand, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch

from blade_compile.distill.digits_data import ClipSpec, bounce, digits, draw, sample_clips


def test_splits_share_no_digit_and_hold_all() -> None:
    parts = [digits(split) for split in ("teacher", "judge", "held_out")]  # type: ignore[arg-type]
    assert sum(len(labels) for _, labels in parts) == 1797
    keys = [{image.numpy().tobytes() for image in images} for images, _ in parts]
    assert all(not a & b for a, b in itertools.combinations(keys, 2))
    for images, labels in parts:
        assert images.shape[1:] == (8, 8) and float(images.min()) == -1 and float(images.max()) == 1
        assert sorted(set(labels.tolist())) == list(range(10))
        assert min(labels.bincount().tolist()) >= 0.06 * len(labels)


def test_the_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    expected = torch.tensor(datasets.load_digits().images).float() / 8 - 1
    ours = torch.cat([digits(split)[0] for split in ("teacher", "judge", "held_out")])  # type: ignore[arg-type]
    assert {x.numpy().tobytes() for x in ours} == {x.numpy().tobytes() for x in expected}


def test_bounces_by_hand() -> None:
    start, velocity = torch.tensor([2, 0, 3, 1]), torch.tensor([1, -1, 2, 0])
    assert bounce(start, velocity, 6, 3).tolist() == [
        [2, 3, 2, 1, 0, 1],
        [0, 1, 2, 3, 2, 1],
        [3, 1, 1, 3, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("speeds", [(1,), (1, 2), (0,), (5,)])
def test_positions_stay_on_the_canvas_and_move_at_the_speeds(speeds: tuple[int, ...]) -> None:
    start = torch.randint(0, 6, (50,))
    velocity = torch.tensor(speeds)[torch.randint(0, len(speeds), (50,))]
    places = bounce(start, velocity, 20, 5)
    assert int(places.min()) >= 0 and int(places.max()) <= 5
    assert int(places.diff(dim=1).abs().max()) <= max(speeds)


def test_draw_puts_a_digit_where_it_is_told() -> None:
    image = torch.rand(1, 8, 8)
    rows, columns = torch.tensor([[0, 3]]), torch.tensor([[2, 1]])
    clip = draw(image, rows, columns, 11)
    assert clip.shape == (1, 1, 2, 11, 11)
    expected = torch.full((2, 11, 11), -1.0)
    expected[0, 0:8, 2:10] = image[0]
    expected[1, 3:11, 1:9] = image[0]
    assert torch.equal(clip[0, 0], expected)


def test_equal_generators_give_equal_clips() -> None:
    spec = ClipSpec(frames=4, size=12, speeds=(1, 2))
    first, again, other = (sample_clips("teacher", 5, spec, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (5, 1, 4, 12, 12) and first[0].dtype == torch.float32
    assert float(first[0].min()) == -1 and float(first[0].max()) == 1


def test_balanced_clips_take_the_classes_in_turn() -> None:
    clips, labels = sample_clips("held_out", 25, ClipSpec(), torch.Generator().manual_seed(0), balanced=True)
    assert labels.tolist() == [i % 10 for i in range(25)]
    known = {image.numpy().tobytes(): int(label) for image, label in zip(*digits("held_out"))}
    found = []
    for clip in clips[:, 0, 0]:
        windows = [clip[r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
        found += [known[w.numpy().tobytes()] for w in windows if w.numpy().tobytes() in known][:1]
    assert found == labels.tolist()


def test_bad_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 8"):
        ClipSpec(size=8)
    with pytest.raises(ValueError, match="speeds are \\(5,\\)"):
        ClipSpec(size=12, speeds=(5,))
    with pytest.raises(ValueError, match="use one of teacher"):
        digits("test")  # type: ignore[arg-type]
