# SPDX-License-Identifier: Apache-2.0
"""Packing: which samples share a prompt, which go into which micro-batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from megatron_rl.training.packing import Bundle, PackPlan, build_bundles, bundle_cost, plan_packing
from megatron_rl.types import Prompt, Row, TrainSample

HIDDEN = 128


def _bundles(lengths: Sequence[int]) -> list[Bundle]:
    """Plain sequences."""
    return [Bundle((i,), 0, (n,), bundle_cost(0, [n], HIDDEN)) for i, n in enumerate(lengths)]


def _lengths(seed: int, count: int, shortest: int = 50, longest: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(shortest, longest) for _ in range(count)]


def _members(plan: PackPlan) -> list[list[list[int]]]:
    """[dp][microbatch]: sample indices."""
    return [[[i for members in bin for i in members] for bin in rank] for rank in plan.bins]


def _rank_costs(plan: PackPlan, bundles: Sequence[Bundle]) -> list[float]:
    return [sum(bundles[i].cost for bin in rank for i in bin) for rank in _members(plan)]


def test_cost_by_hand() -> None:
    """2 prompt tokens attend to 2 of each other (half counted), responses of 1 and 4 to the prompt and themselves."""
    attended = 2**2 / 2 + (2 * 1 + 1 / 2) + (2 * 4 + 4**2 / 2)
    assert bundle_cost(2, [1, 4], HIDDEN) == pytest.approx(7 + attended / (6 * HIDDEN))
    assert bundle_cost(0, [100], HIDDEN) == pytest.approx(bundle_cost(60, [40], HIDDEN))  # one causal sequence


def _group(prompt_id: int, num_prompt: int, responses: Sequence[int]) -> list[TrainSample]:
    prompt = Prompt(prompt_id, Row("made:1", "", ""), (1,) * num_prompt, ())
    return [TrainSample(prompt, (2,) * n, (0.0,) * n) for n in responses]


def test_bundles_share_a_prompt_within_the_budget() -> None:
    samples = [*_group(1, 10, [5, 6, 7]), *_group(2, 10, [1]), *_group(3, 10, [9, 9])]
    found = [(b.members, b.num_tokens) for b in build_bundles(samples, 100, HIDDEN, share_prefix=True)]
    assert found == [((0, 1, 2), 28), ((3,), 11), ((4, 5), 28)]
    found = [(b.members, b.num_tokens) for b in build_bundles(samples, 21, HIDDEN, share_prefix=True)]
    assert found == [((0, 1), 21), ((2,), 17), ((3,), 11), ((4,), 19), ((5,), 19)]
    found = [(b.members, b.num_tokens) for b in build_bundles(samples, 100, HIDDEN, share_prefix=False)]
    assert found == [((i,), n) for i, n in enumerate([15, 16, 17, 11, 19, 19])]


def test_a_response_without_room_is_named_by_the_plan_not_by_the_bundle() -> None:
    bundles = build_bundles(_group(1, 10, [5, 50]), 20, HIDDEN, share_prefix=True)
    assert [b.num_tokens for b in bundles] == [15, 60]
    with pytest.raises(ValueError, match="1 sequences are longer"):
        plan_packing(bundles, 1, 20)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1000, 2500, 16_384])
@pytest.mark.parametrize("count", [1, 7, 64, 257])
def test_every_plan(num_ranks: int, budget: int, count: int) -> None:
    """Each sample once, no micro-batch over budget, equally many on every rank, the same plan every time."""
    lengths = _lengths(count, count)
    plan = plan_packing(_bundles(lengths), num_ranks, budget)
    bins = [bin for rank in _members(plan) for bin in rank]
    assert len(plan.bins) == num_ranks and len({len(rank) for rank in plan.bins}) == 1
    assert sorted(i for bin in bins for i in bin) == list(range(count))
    assert max(sum(lengths[i] for i in bin) for bin in bins) <= budget
    assert plan == plan_packing(_bundles(lengths), num_ranks, budget)


@pytest.mark.parametrize("seed", range(5))
def test_work_is_balanced(seed: int) -> None:
    """Lengths over a factor of 20, several to a micro-batch: within a few percent of each other."""
    bundles = _bundles(_lengths(seed, 128))
    costs = _rank_costs(plan_packing(bundles, 4, 4096), bundles)
    assert max(costs) / min(costs) < 1.05


def test_one_long_sample_is_worth_many_short_ones() -> None:
    """By tokens, 4000 + 2 x 1000 would match 6 x 1000; with attention the 4000 alone cost more than all the rest."""
    plan = plan_packing(_bundles([4000, *[1000] * 8]), 2, 8000)
    assert sorted(_members(plan)) == [[[0]], [[1, 2, 3, 4, 5, 6, 7, 8]]]


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "budget", "per_rank"),
    [
        ([100] * 8, 2, 400, 1),
        ([100] * 9, 2, 400, 2),
        ([400] * 5, 2, 400, 3),
        ([60, 60, 60, 40], 1, 100, 3),  # 220 tokens would fit three times 100, in one way only
        ([5], 4, 10, 1),
        ([], 2, 10, 1),
    ],
)
def test_fewest_micro_batches(lengths: list[int], num_ranks: int, budget: int, per_rank: int) -> None:
    assert [len(rank) for rank in plan_packing(_bundles(lengths), num_ranks, budget).bins] == [per_rank] * num_ranks


def test_too_long_sequences_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError) as error:
        plan_packing(_bundles([50, 101, 150]), 2, 100)
    assert str(error.value) == (
        "train.max_tokens_per_microbatch=100: 2 sequences are longer (up to 150 tokens); raise it or lower "
        "data.max_prompt_tokens / rollout.max_response_tokens"
    )


def test_a_sequence_of_exactly_the_budget_fits() -> None:
    assert _members(plan_packing(_bundles([100]), 1, 100)) == [[[0]]]
