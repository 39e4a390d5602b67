# SPDX-License-Identifier: Apache-2.0
"""Packing: which sample goes where, and a micro-batch computed by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_rl.training.packing import PackPlan, build_microbatch, gather_embeds, plan_packing, sequence_cost
from megatron_rl.types import Prompt, Row, TrainSample, VideoArtifact

HIDDEN = 128
V = 9  # placeholder token


def _lengths(seed: int, count: int, shortest: int = 50, longest: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(shortest, longest) for _ in range(count)]


def _rank_costs(plan: PackPlan, lengths: Sequence[int]) -> list[float]:
    return [sum(sequence_cost(lengths[i], HIDDEN) for bin in rank for i in bin) for rank in plan.bins]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1000, 2500, 16_384])
@pytest.mark.parametrize("count", [1, 7, 64, 257])
def test_every_plan(num_ranks: int, budget: int, count: int) -> None:
    """Each sample once, no micro-batch over budget, equally many on every rank, the same plan every time."""
    lengths = _lengths(count, count)
    plan = plan_packing(lengths, num_ranks, budget, HIDDEN)
    bins = [bin for rank in plan.bins for bin in rank]
    assert len(plan.bins) == num_ranks and len({len(rank) for rank in plan.bins}) == 1
    assert sorted(i for bin in bins for i in bin) == list(range(count))
    assert max(sum(lengths[i] for i in bin) for bin in bins) <= budget
    assert plan == plan_packing(lengths, num_ranks, budget, HIDDEN)


@pytest.mark.parametrize("seed", range(5))
def test_work_is_balanced(seed: int) -> None:
    """Lengths over a factor of 20, several to a micro-batch: within a few percent of each other."""
    lengths = _lengths(seed, 128)
    costs = _rank_costs(plan_packing(lengths, 4, 4096, HIDDEN), lengths)
    assert max(costs) / min(costs) < 1.05


def test_one_long_sample_is_worth_many_short_ones() -> None:
    """By tokens, 4000 + 2 x 1000 would match 6 x 1000; with attention the 4000 alone cost more than all the rest."""
    plan = plan_packing([4000, *[1000] * 8], 2, 8000, HIDDEN)
    assert sorted(plan.bins) == [((0,),), ((1, 2, 3, 4, 5, 6, 7, 8),)]


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
    assert [len(rank) for rank in plan_packing(lengths, num_ranks, budget, HIDDEN).bins] == [per_rank] * num_ranks


def test_too_long_sequences_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError) as error:
        plan_packing([50, 101, 150], 2, 100, HIDDEN)
    assert str(error.value) == (
        "train.max_tokens_per_microbatch=100: 2 sequences are longer (up to 150 tokens); raise it or lower "
        "data.max_prompt_tokens / rollout.max_response_tokens"
    )


def test_a_sequence_of_exactly_the_budget_fits() -> None:
    assert plan_packing([100], 1, 100, HIDDEN).bins == (((0,),),)


def _video(key: str, num_tokens: int) -> VideoArtifact:
    return VideoArtifact(key, "", (), (), (0, 0), (1, 2, 2 * num_tokens), 1.0, num_tokens)


def _sample(
    prompt: Sequence[int], response: Sequence[int], advantage: float, weight: float, *videos: VideoArtifact
) -> TrainSample:
    row = Row("made:1", "", "")
    logprobs = tuple(-0.5 * (i + 1) for i in range(len(response)))
    return TrainSample(Prompt(0, row, tuple(prompt), videos), tuple(response), advantage, logprobs, weight)


def _positions(ids: Sequence[int], videos: Sequence[VideoArtifact]) -> Tensor:
    """Recognisable: what the sample is told by its first token."""
    return ids[0] * 100 + torch.arange(len(ids)).expand(3, -1)


def _starts(ids: Sequence[int], videos: Sequence[VideoArtifact]) -> list[int]:
    """Videos follow the first token, with one token between them."""
    starts, position = [], 1
    for video in videos:
        starts.append(position)
        position += video.num_tokens + 1
    return starts


A, B = _video("a", 2), _video("b", 1)
SAMPLES = [
    _sample([1, 1], [5], 0.25, 1.0),
    _sample([2, V, V, 3], [6, 7, 8], -1.0, 0.5, A),
    _sample([3, V, 4, V, V, 3], [4, 4], 2.0, 1.5, B, A),
]


def test_micro_batch_by_hand() -> None:
    batch = build_microbatch(SAMPLES, (2, 1), 8, _positions, _starts)
    assert batch.token_ids.tolist() == [3, V, 4, V, V, 3, 4, 4, 2, V, V, 3, 6, 7, 8, 0]
    assert batch.segments == (8, 7, 1)
    assert batch.position_ids.tolist() == [[*range(300, 308), *range(200, 207), 0]] * 3
    assert batch.logit_rows.tolist() == [5, 6, 11, 12, 13]  # the position before each response token
    assert batch.targets.tolist() == [4, 4, 6, 7, 8]
    assert batch.advantages.tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.0, -0.5, -1.0, -1.5]
    assert batch.weights.tolist() == [1.5, 1.5, 0.5, 0.5, 0.5]
    assert batch.video_rows.tolist() == [1, 3, 4, 9, 10]
    assert batch.videos == (B, A, A)
    assert batch.samples == (2, 1)
    assert batch.num_response_tokens == 5
    assert torch.equal(batch.token_ids[batch.logit_rows + 1], batch.targets)


def test_embeddings_come_in_the_order_of_the_video_rows() -> None:
    batch = build_microbatch(SAMPLES, (2, 1), 1, _positions, _starts)
    embeds = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0]])}
    gathered = gather_embeds(batch, embeds)
    assert gathered is not None and gathered[:, 0].tolist() == [3.0, 1.0, 2.0, 1.0, 2.0]
    assert gather_embeds(build_microbatch(SAMPLES, (0,), 1, _positions, _starts), embeds) is None


@pytest.mark.parametrize(("multiple", "segments"), [(1, (3,)), (3, (3,)), (4, (3, 1))])
def test_padding_is_a_segment_of_its_own(multiple: int, segments: tuple[int, ...]) -> None:
    batch = build_microbatch(SAMPLES, (0,), multiple, _positions, _starts)
    assert batch.segments == segments and len(batch.token_ids) == sum(segments)
    assert batch.logit_rows.tolist() == [1]


def test_an_empty_micro_batch_is_padding_only() -> None:
    batch = build_microbatch(SAMPLES, (), 4, _positions, _starts)
    assert batch.token_ids.tolist() == [0] * 4 and batch.segments == (4,)
    assert batch.position_ids.shape == (3, 4) and batch.num_response_tokens == 0
    assert batch.logit_rows.dtype == batch.targets.dtype == torch.int64
