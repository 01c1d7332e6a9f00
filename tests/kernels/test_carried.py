"""State over steps at the operator: AdaSpa as a plain loop does it, kept apart by site, sample and branch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blade_compile.kernels import (
    carried,
    lists,
    observe,
    ops,  # noqa: F401 (registers the operators)
    ops_carried,  # noqa: F401
    policy_adaspa,
    reference,
    reference_search,
)
from blade_compile.kernels.carried import Carrier, Phase, Schedule

STEPS, SEARCHES = 12, (3, 7)
SCHEDULE = Schedule(search_steps=SEARCHES)
BLOCK = 16


def tensors(step: int, branch: int = 0, B: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k and v of a step: they drift slowly, and branches differ. 6 query blocks, 7 key blocks, both ragged."""
    make = torch.Generator().manual_seed(100 + branch)
    q, k, v = (torch.randn(B, h, n, 8, generator=make, dtype=torch.float64) for h, n in ((4, 90), (2, 111), (2, 111)))
    turn = torch.randn(8, 8, generator=make, dtype=torch.float64) * 0.1 * step
    return tuple(x.to(dtype) for x in (3 * q + q @ turn, 2 * k + k @ turn.T, v))


def call(
    qkv: tuple[Tensor, ...],
    carrier: Carrier | None,
    step: int = 0,
    branch: int = 0,
    schedule: Schedule = SCHEDULE,
    policy: str = "adaspa",
    **kwargs: Any,
) -> Tensor:
    """One call of the operator as the wrapper of a compiled graph makes it."""
    clock = torch.zeros(len(carried.CLOCK_NUMBERS), dtype=torch.int32)
    if carrier is not None:
        carrier.begin(step, branch)
        clock = torch.tensor(carrier.clock(policy, schedule), dtype=torch.int32)
    settings: dict[str, Any] = {"sparsity": 0.6, "block_size": BLOCK, "probe_tokens": 8, "site": "attn"} | kwargs
    with carried.using(carrier):
        out = torch.ops.blade.carried_attention.default(
            *qkv, clock, policy=policy, schedule=schedule.to_json(), **settings
        )
    assert out.transpose(1, 2).is_contiguous()  # what the fake kernel promises
    return out


class PlainAdaSpa:
    """The paper's algorithm as one loop over heads and rows; algorithms 3.3 to 3.5."""

    def __init__(self, sparsity: float, mask: Tensor | None = None, text: int = 0) -> None:
        self.sparsity, self.mask, self.text = sparsity, mask, text
        self.lse: Tensor | None = None
        self.keep: Tensor | None = None

    def step(self, step: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        dense, lse, _ = reference_search.attention_and_block_sums(q, k, v, self.mask, scale, BLOCK)
        if step == SEARCHES[0]:
            self.lse = lse
        if step in SEARCHES:
            assert self.lse is not None
            self.keep = self.search(reference_search.block_sums(q, k, self.lse, self.mask, scale, BLOCK))
        if step <= SEARCHES[0]:
            return dense
        assert self.keep is not None
        return reference.block_sparse_attention(q, k, v, *reference.lists_from_mask(self.keep), self.mask, BLOCK)[0]

    def search(self, sums: Tensor) -> Tensor:
        keep = torch.zeros(sums.shape, dtype=torch.bool)
        for b in range(sums.shape[0]):
            recall = []
            for h in range(sums.shape[1]):
                keep[b, h] = self.top(sums[b, h], self.sparsity)
                recall.append(float(sums[b, h][keep[b, h]].sum() / sums[b, h].sum()))
            n = min(sum(r > 0.8 for r in recall), len(recall) // 2)
            best_first = sorted(range(len(recall)), key=lambda h: -recall[h])
            for h in best_first[:n]:
                keep[b, h] = self.top(sums[b, h], (1 + self.sparsity) / 2)
            for h in best_first[len(recall) - n :]:
                keep[b, h] = self.top(sums[b, h], (3 * self.sparsity - 1) / 2)
        return keep

    def top(self, sums: Tensor, sparsity: float) -> Tensor:
        nQ, nK = sums.shape
        count = max(1, math.floor((1 - sparsity) * nK + 1e-6))
        keep = torch.zeros(nQ, nK, dtype=torch.bool)
        strip = math.ceil(self.text / BLOCK)  # the last tokens are text
        for row in range(nQ):
            free = range(nK - strip)
            keep[row, sorted(free, key=lambda j: -float(sums[row, j]))[:count]] = True
        if strip:
            keep[:, -strip:] = True
            keep[-strip:] = True
        return keep


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
@pytest.mark.parametrize("case", ["plain", "masked-text"])
def test_a_loop_with_guidance_equals_the_plain_algorithm(case: str, on_device: bool) -> None:
    kwargs: dict[str, Any] = {}
    mask = None
    if case == "masked-text":
        mask = torch.arange(111)[None] < 100
        kwargs = {"key_mask": mask, "protect_q": [-10, 10], "protect_k": [-10, 10]}
    carrier = Carrier(STEPS, 2, on_device=on_device)
    plain = [PlainAdaSpa(0.6, mask, 10 if kwargs else 0) for _ in range(2)]
    for step, branch in itertools.product(range(1, STEPS + 1), range(2)):
        qkv = tensors(step, branch)
        expected = plain[branch].step(step, *qkv)
        found = call(qkv, carrier, step, branch, **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert plain[0].keep is not None and plain[1].keep is not None
    assert not torch.equal(plain[0].keep, plain[1].keep)  # or one branch's mask would do for the other
    assert len(set(plain[0].keep[0].sum((-2, -1)).tolist())) > 1  # more than one level


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drift", [None, 0.02])
def test_the_clock_and_the_host_decide_alike(dtype: torch.dtype, drift: float | None) -> None:
    schedule = Schedule(search_steps=SEARCHES, sparsity_steps=((5, 0.4), (9, 0.7)), drift=drift)
    host, clock = Carrier(STEPS, 2), Carrier(STEPS, 2, on_device=True)
    for step, branch in itertools.product(range(1, STEPS + 1), range(2)):
        qkv = tensors(step, branch, B=2, dtype=dtype)
        want, found = (call(qkv, carrier, step, branch, schedule) for carrier in (host, clock))
        torch.testing.assert_close(found, want, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
        slot = clock.slots.get(next(iter(clock.slots)))
        if step >= SEARCHES[0]:
            assert slot is not None and torch.equal(slot.bits[branch], host.slots["attn", branch].bits)


def test_a_replayed_graph_reads_the_clock() -> None:
    """The same Python call, as a captured graph repeats it, does what the clock says at its address."""
    carrier = Carrier(STEPS, 1, on_device=True)
    clock = torch.zeros(len(carried.CLOCK_NUMBERS), dtype=torch.int32)
    reference_carrier = Carrier(STEPS, 1)
    carrier.begin(1, 0)  # as when it was captured; never again
    for step in range(1, STEPS + 1):
        qkv = tensors(step)
        want = call(qkv, reference_carrier, step)
        for place, number in enumerate(reference_carrier.clock("adaspa", SCHEDULE)):
            clock[place].fill_(number)
        with carried.using(carrier):
            found = torch.ops.blade.carried_attention.default(
                *qkv, clock, sparsity=0.6, block_size=BLOCK, site="attn", schedule=SCHEDULE.to_json()
            )
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_steps_before_the_first_search_are_dense_and_keep_nothing() -> None:
    carrier = Carrier(STEPS)
    for step in (1, 2):
        q, k, v = qkv = tensors(step)
        torch.testing.assert_close(call(qkv, carrier, step), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert not carrier.slots


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
def test_a_sample_is_the_same_alone_and_in_a_batch(on_device: bool) -> None:
    schedule = Schedule(search_steps=SEARCHES, drift=0.05)
    whole, alone = Carrier(STEPS, on_device=on_device), Carrier(STEPS, on_device=on_device)
    for step in range(1, STEPS + 1):
        qkv = tensors(step, B=2, dtype=torch.float32)
        if step == 5:  # only the first sample changes abruptly
            qkv[1][0].mul_(-1)
        both = call(qkv, whole, step, schedule=schedule)
        single = call(tuple(x[1:] for x in qkv), alone, step, schedule=schedule)
        assert torch.equal(both[1:], single), step


def test_sites_and_branches_do_not_mix() -> None:
    """Each (site, branch) gives what it gives with a carrier of its own, whatever runs in between."""
    shared = Carrier(STEPS, 2)
    own = {(site, branch): Carrier(STEPS) for site in "ab" for branch in range(2)}
    for step, site, branch in itertools.product(range(1, STEPS + 1), "ab", range(2)):
        qkv = tensors(step, 2 * ord(site) + branch)
        want = call(qkv, own[site, branch], step, site=site)
        assert torch.equal(call(qkv, shared, step, branch, site=site), want)
    assert len(shared.slots) == 4


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
def test_other_sizes_are_searched_at_once(on_device: bool) -> None:
    carrier = Carrier(STEPS, on_device=on_device)
    for step in range(1, 5):
        call(tensors(step), carrier, step)
    smaller = tuple(x[:, :, :70] for x in tensors(5))
    dense = F.scaled_dot_product_attention(*smaller, enable_gqa=True)
    torch.testing.assert_close(call(smaller, carrier, 5), dense)  # a first search gives dense attention
    assert (call(smaller, carrier, 6) - dense).abs().max() > 1e-3


def test_reuse_reads_the_mask_of_the_search() -> None:
    carrier = Carrier(STEPS)
    for step in range(1, 4):
        call(tensors(step), carrier, step)
    kept = carried.unpack(carrier.slots["attn", 0].bits, 7)
    q, k, v = tensors(9)  # far from the search: its own mask is another one
    num, idx = reference.lists_from_mask(kept)
    want = reference.block_sparse_attention(q, k, v, num, idx, None, BLOCK)[0]
    torch.testing.assert_close(call((q, k, v), carrier, 4), want)
    own = reference_search.block_sums(q, k, carrier.slots["attn", 0].lse, None, 8**-0.5, BLOCK)
    assert not torch.equal(PlainAdaSpa(0.6).search(own), kept)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
def test_drift_searches_again_for_the_sample_that_drifted(on_device: bool) -> None:
    schedule = Schedule(search_steps=(1,), drift=0.1)
    carrier = Carrier(STEPS, on_device=on_device)
    q, k, v = tensors(0, B=2, dtype=torch.float32)

    def masks() -> Tensor:
        slot = next(iter(carrier.slots.values()))
        return (slot.bits[0] if on_device else slot.bits).clone()

    call((q, k, v), carrier, 1, schedule=schedule)
    first = masks()
    call((q, k, v), carrier, 2, schedule=schedule)
    assert torch.equal(masks(), first)  # nothing has aged
    k[1] = k[1].roll(40, 1)
    call((q, k, v), carrier, 3, schedule=schedule)
    assert torch.equal(masks()[0], first[0]) and not torch.equal(masks()[1], first[1])
    again = masks()
    call((q, k, v), carrier, 4, schedule=schedule)
    assert torch.equal(masks(), again)  # the new mask fits


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
@pytest.mark.parametrize("policy", ["asa", "vsa", "asa_g"])
def test_schedules_of_policies_that_remember_nothing(policy: str, on_device: bool) -> None:
    options = '{"global_window": 16}' if policy == "asa_g" else ""
    schedule = Schedule(dense_steps=2, sparsity_steps=((4, 0.3),))
    carrier = Carrier(STEPS, on_device=on_device)
    settings = {"block_size": BLOCK, "probe_tokens": 8, "policy": policy, "options": options}
    for step, sparsity in ((1, None), (2, None), (3, 0.6), (4, 0.3), (5, 0.3)):
        q, k, v = qkv = tensors(step)
        if sparsity is None:
            want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            want = torch.ops.blade.sparse_sdpa.default(*qkv, sparsity=sparsity, **settings)
        found = call(qkv, carrier, step, schedule=schedule, policy=policy, options=options)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_without_a_generation_each_call_searches_for_itself() -> None:
    q, k, v = qkv = tensors(0)
    _, _, sums = reference_search.attention_and_block_sums(q, k, v, None, 8**-0.5, BLOCK)
    kept = PlainAdaSpa(0.6).search(sums)
    want = reference.block_sparse_attention(q, k, v, *reference.lists_from_mask(kept), None, BLOCK)[0]
    torch.testing.assert_close(call(qkv, None), want)
    lasting = Carrier(STEPS, on_device=True)  # what a captured graph does there: step 0
    torch.testing.assert_close(call(qkv, lasting, 0), want)
    assert not next(iter(lasting.slots.values())).valid.any()


def test_auto_keeps_short_sites_dense_and_remembers_nothing() -> None:
    carrier = Carrier(STEPS)
    for step in (3, 4):
        q, k, v = qkv = tensors(step, dtype=torch.float32)
        found = call(qkv, carrier, step, when="auto")
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert not carrier.slots and not carrier.used


def test_observed_densities() -> None:
    carrier = Carrier(STEPS)
    with observe.record() as events:
        for step in range(1, 9):
            call(tensors(step, dtype=torch.float32), carrier, step)
    attended = [e.density for e in events if e.op == "block_sparse_attention"]
    assert attended[:3] == [1.0] * 3 and all(0 < d < 0.6 for d in attended[3:]) and len(attended) == 8
    assert [e.path for e in events if e.op == "mask_predict"] == ["reuse"] * 3 + ["search", "reuse"]


def test_operator_checks() -> None:
    qkv = tensors(0, dtype=torch.float32)
    clock = torch.zeros(len(carried.CLOCK_NUMBERS), dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.blade.carried_attention.default,
        (*qkv, clock),
        {"sparsity": 0.5, "block_size": BLOCK},
        test_utils=("test_schema", "test_faketensor"),
    )
    out = call(qkv, None)
    assert out.transpose(1, 2).is_contiguous()


def test_empty_inputs() -> None:
    for shape in ((0, 2, 20, 8), (1, 2, 0, 8)):
        x = torch.randn(shape)
        assert call((x, x, x), Carrier(STEPS), 3).shape == shape


# --- levels of heads -------------------------------------------------------------------------------------------------


def test_three_levels_and_their_mean() -> None:
    recall = torch.tensor([[0.9, 0.5, 0.95, 0.7, 0.6, 0.85], [0.9] * 6, [0.1] * 6])
    levels = policy_adaspa.head_levels(recall)
    assert levels[0].tolist() == [1, -1, 1, -1, -1, 1]
    assert levels[1].tolist() == [1, 1, 1, -1, -1, -1]  # more than half are good: the groups meet, and never overlap
    assert levels[2].tolist() == [0] * 6
    assert (levels.sum(1) == 0).all()


@given(st.integers(1, 9), st.floats(0.34, 0.99), st.integers(0, 2**31))
def test_mean_sparsity_is_kept(heads: int, sparsity: float, seed: int) -> None:
    recall = torch.rand(2, heads, generator=torch.Generator().manual_seed(seed))
    levels = policy_adaspa.head_levels(recall)
    levels = levels[..., None] == torch.tensor([0, 1, -1])
    shares = levels.double() @ torch.tensor([sparsity, (1 + sparsity) / 2, (3 * sparsity - 1) / 2], dtype=torch.float64)
    torch.testing.assert_close(shares.mean(1), torch.full((2,), sparsity, dtype=torch.float64))
    assert (shares >= 0).all() and (shares < 1).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, None])
def test_low_budgets_and_masses_have_one_level(sparsity: float | None) -> None:
    sums = torch.rand(1, 4, 5, 9)
    sums[:, 0, :, 0] = 100  # one head with perfect recall
    found = policy_adaspa.select(sums, sparsity, 0.5, 0.05, 1.0, None, None)
    want = reference.select_blocks(sums, sparsity, 0.5, 0.05, 1.0)
    assert all(map(torch.equal, found, want))


def test_budgets_of_a_calibration_go_before_levels() -> None:
    sums = torch.rand(1, 2, 5, 10)
    num, _ = policy_adaspa.select(sums, 0.8, 0.95, 0.05, 1.0, None, None, (0.5, 0.9))
    assert num[0, :, 0].tolist() == [5, 1]


def test_an_lse_that_is_far_too_small_still_ranks() -> None:
    sums = torch.tensor([[[[math.inf, 1e38, 2.0]], [[1.0, math.nan, math.inf]]]])
    num, idx = policy_adaspa.select(sums, 0.67, 0.95, 0.05, 1.0, None, None)
    assert (num >= 1).all() and idx[0, 0, 0, 0] == 0 and 1 in idx[0, 1, 0]


# --- storage ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_hold_the_lists(heads: int, nQ: int, nK: int, seed: int) -> None:
    keep = torch.rand(2, heads, nQ, nK, generator=torch.Generator().manual_seed(seed)) > 0.6
    num, idx = reference.lists_from_mask(keep)
    bits = carried.pack(num, idx.masked_fill(torch.arange(nK) >= num[..., None], 99), nK)
    assert bits.dtype == torch.uint8 and bits.shape == (2, heads, nQ, math.ceil(nK / 8))
    assert torch.equal(carried.unpack(bits, nK), keep)
    found = carried.lists_of(bits, nK)
    assert torch.equal(found[0], num) and torch.equal(found[1], idx)


def test_storage_goes_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.rand(2, 3, 9, 21) > 0.5
    monkeypatch.setattr(carried, "_UNPACKED_ELEMENTS", 1)
    num, idx = reference.lists_from_mask(keep)
    found = carried.lists_of(carried.pack(num, idx, 21), 21)
    assert torch.equal(found[0], num) and torch.equal(found[1], idx)


def test_memory_of_hunyuanvideo_at_110k_tokens() -> None:
    lse, bits = carried.slot_bytes(1, 24, 110_000, 110_000, 64)
    assert 60 * lse / 1e9 == pytest.approx(0.63, abs=0.005)
    assert 60 * bits / 1e9 == pytest.approx(0.53, abs=0.005)


def test_memory_of_a_slot_is_what_was_said() -> None:
    carrier = Carrier(STEPS)
    call(tensors(3, B=2, dtype=torch.float32), carrier, 3)
    slot = carrier.slots["attn", 0]
    held = [x.untyped_storage().nbytes() for _, x in slot.tensors()]
    assert held == list(carried.slot_bytes(2, 4, 90, 111, BLOCK))


# --- schedules -------------------------------------------------------------------------------------------------------


def phases(schedule: Schedule, n: int, policy: str = "adaspa") -> list[Phase]:
    return [schedule.phase(policy, step, n) for step in range(1, n + 1)]


def test_the_papers_schedule() -> None:
    found = phases(Schedule(), 50)
    assert found == [Phase.DENSE] * 9 + [Phase.SEARCH] + [Phase.REUSE] * 19 + [Phase.REFRESH] + [Phase.REUSE] * 20
    assert phases(Schedule(dense_steps=10), 50) == found


@pytest.mark.parametrize("n", range(1, 12))
def test_any_number_of_steps_has_a_first_search(n: int) -> None:
    assert phases(Schedule(), n).count(Phase.SEARCH) == 1


def test_a_change_of_sparsity_searches() -> None:
    found = phases(Schedule(search_steps=(2,), sparsity_steps=((1, 0.5), (4, 0.8))), 5)
    assert found == [Phase.DENSE, Phase.SEARCH, Phase.REUSE, Phase.REFRESH, Phase.REUSE]


def test_json_round_trip() -> None:
    schedule = Schedule(2, ((1, 0.5), (9, 0.75)), (3, 5), False, 0.1)
    assert Schedule.parse(schedule.to_json()) == schedule
    assert Schedule().to_json() == "" and Schedule.parse("") == Schedule()


def bad() -> Iterator[tuple[Callable[[], object], str]]:
    yield lambda: Schedule().searches(0) if Schedule(search_steps=(9,)).searches(8) else None, "num_steps=8.*step 9"
    yield lambda: Schedule(dense_steps=9).searches(8), "num_steps=8.*step 9"
    yield lambda: Schedule(dense_steps=9, search_steps=(3,)).searches(20), "dense_steps=9.*step 3"
    yield lambda: Schedule(search_steps=(3, 3)), "ascending"
    yield lambda: Schedule(search_steps=(0,)), "from 1"
    yield lambda: Schedule(search_steps=()), "empty"
    yield lambda: Schedule(sparsity_steps=((1, 1.0),)), r"\[0, 1\)"
    yield lambda: Schedule(sparsity_steps=((5, 0.5), (2, 0.5))), "ascending"
    yield lambda: Schedule(drift=0.0), "drift=0.0"
    yield lambda: Schedule(dense_steps=-1), "dense_steps=-1"
    yield lambda: Schedule.parse("{"), "JSON"
    yield lambda: Schedule.parse('{"steps": 1}'), "search_steps"


@pytest.mark.parametrize(("action", "message"), list(bad()))
def test_bad_schedules(action: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()


def test_forced_strips_come_on_top() -> None:
    force = lists.forced_blocks([-20, 20], 160, BLOCK, torch.device("cpu"))
    num, _ = policy_adaspa.select(torch.rand(1, 2, 10, 10), 0.8, 0.95, 0.05, 1.0, force, force, head_adaptive=False)
    assert num[0, 0].tolist() == [4] * 8 + [10] * 2
