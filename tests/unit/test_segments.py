# SPDX-License-Identifier: Apache-2.0
"""Who attends to whom: every plan, put together from all its parts, is the mask; and the work is shared fairly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model_providers.attention.segments import (
    AttentionPlan,
    Interval,
    QuerySlice,
    Segment,
    SegmentRun,
    TokenShard,
    block_size,
    plan_attention,
    plan_one_sequence,
    plan_whole_attention,
    shard,
    shard_by_tokens,
)
from tests.attention_masks import mask_of, segments_of

WEIGHT = 1 / (6 * 128)


def _random_segments(rng: random.Random) -> list[Segment]:
    groups = [
        (rng.randint(1, 40), [rng.randint(1, 9) for _ in range(rng.randint(0, 4))]) for _ in range(rng.randint(1, 4))
    ]
    return segments_of(groups)


def _positions(held: TokenShard) -> list[int]:
    return [t for run in held for t in range(run.start, run.stop)]


def _attended(plan: AttentionPlan, own: Sequence[int], blocks: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(query, key) packed positions, once per time that the plan computes them."""
    asking = [own[i] for interval in plan.run_rows for i in range(*interval)]
    first = 0
    for length in plan.run_lengths:
        yield from ((asking[i], asking[j]) for i in range(first, first + length) for j in range(first, i + 1))
        first += length
    assert first == plan.num_queries == len(asking)
    for slices, block in [(plan.own, own), *zip(plan.blocks, blocks, strict=True)]:
        for part in slices:
            keys = [block[j] for interval in part.k for j in range(*interval)]
            yield from ((asking[i], key) for i in range(*part.q) for key in keys)


def _mask_of_plans(
    segments: Sequence[Segment], shards: Sequence[TokenShard], queries: Sequence[Interval] | None = None
) -> Tensor:
    counts = torch.zeros(segments[-1].stop, segments[-1].stop, dtype=torch.int)
    rows = [_positions(held) for held in shards]
    plans = [plan_attention(segments, shards, rank, queries) for rank in range(len(shards))]
    for rank, plan in enumerate(plans):
        blocks = [
            [rows[origin][i] for interval in exports for i in range(*interval)]
            for origin, exports in enumerate(plan.exports)
        ]
        assert [block_size(exports) for exports in plan.exports] == [len(block) for block in blocks]
        assert plan.rank_sizes == tuple(map(len, rows))
        assert plan.query_sizes == tuple(other.num_queries for other in plans)
        for query, key in _attended(plan, rows[rank], blocks):
            counts[query, key] += 1
    return counts


def _random_queries(rng: random.Random, num_tokens: int) -> list[Interval]:
    edges = sorted(rng.sample(range(num_tokens + 1), 2 * rng.randint(0, min(5, num_tokens // 2))))
    return list(zip(edges[::2], edges[1::2], strict=True))


def _asked(mask: Tensor, queries: Sequence[Interval]) -> Tensor:
    """The mask with the rows of all but the queries cleared."""
    asks = torch.zeros(len(mask), dtype=torch.bool)
    for start, stop in queries:
        asks[start:stop] = True
    return mask & asks[:, None]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0])
def test_the_parts_make_the_mask_each_pair_once(num_ranks: int, weight: float) -> None:
    rng = random.Random(num_ranks)
    for _ in range(40):
        segments = _random_segments(rng)
        shards = shard(segments, num_ranks, weight)
        assert sorted(t for held in shards for t in _positions(held)) == list(range(segments[-1].stop))
        mask = mask_of(segments)
        assert torch.equal(_mask_of_plans(segments, shards), mask.int())
        queries = _random_queries(rng, len(mask))
        assert torch.equal(_mask_of_plans(segments, shards, queries), _asked(mask, queries).int())


def test_all_to_all_sees_everything_in_the_order_of_arrival() -> None:
    rng = random.Random(1)
    for num_ranks in (2, 3, 4):
        segments = _random_segments(rng)
        shards = shard_by_tokens(segments, num_ranks)
        assert sorted(t for held in shards for t in _positions(held)) == list(range(segments[-1].stop))
        arrived = [t for held in shards for t in _positions(held)]
        mask = mask_of(segments)
        for queries in (None, _random_queries(rng, len(mask)), _random_queries(rng, len(mask))):
            plan = plan_whole_attention(segments, shards, queries)
            counts = torch.zeros_like(mask, dtype=torch.int)
            for query, key in _attended(plan, arrived, [[]] * num_ranks):
                counts[query, key] += 1
            assert torch.equal(counts, (mask if queries is None else _asked(mask, queries)).int())
            assert plan.rank_sizes == tuple(len(_positions(held)) for held in shards)
            assert plan.query_sizes == tuple(
                plan_attention(segments, shards, rank, queries).num_queries for rank in range(num_ranks)
            )


def test_what_nobody_asks_for_does_not_travel() -> None:
    """In the last layer a response that one rank holds whole needs the prompt; the prompt needs nothing."""
    segments = segments_of([(800, [])])
    shards = shard(segments, 2, WEIGHT)
    whole = plan_attention(segments, shards, 0)
    last = plan_attention(segments, shards, 0, [(790, 800)])
    assert block_size(whole.exports[0]) == 200 and block_size(whole.exports[1]) == 400
    assert last.query_sizes == (10, 0)  # zigzag: rank 0 holds the first and the last quarter
    assert block_size(last.exports[0]) == 0 and block_size(last.exports[1]) == 400


def _work(segments: Sequence[Segment], held: TokenShard, weight: float) -> float:
    """Counted token by token."""
    total = 0.0
    for run in held:
        prefix = segments[run.segment].prefix
        before = segments[prefix].length if prefix is not None else 0
        first = segments[run.segment].start
        total += sum(1 + weight * (before + t - first) for t in range(run.start, run.stop))
    return total


SHAPES = {
    "one long sequence": [(8000, [])],
    "a long prompt, many short responses": [(6000, [60] * 16)],
    "a long prompt, few long responses": [(4000, [2000, 900, 300])],
    "long beside short": [(5000, []), *[(40, [30] * 4)] * 8],
    "many short": [(50 + 7 * i, [20 + i] * 4) for i in range(24)],
    "short prompts, long responses": [(100, [2000] * 4), (100, [1500] * 4)],
    "three alike": [(3000, [])] * 3,
}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_work_and_tokens_are_balanced(shape: str, num_ranks: int) -> None:
    segments = segments_of(SHAPES[shape])
    shards = shard(segments, num_ranks, WEIGHT)
    tokens = [len(_positions(held)) for held in shards]
    work = [_work(segments, held, WEIGHT) for held in shards]
    assert max(tokens) <= 1.06 * sum(tokens) / num_ranks
    assert max(work) <= 1.06 * sum(work) / num_ranks


@pytest.mark.parametrize("shape", SHAPES)
def test_by_tokens_prompts_and_responses_are_balanced_each(shape: str) -> None:
    segments = segments_of(SHAPES[shape])
    for riding in (False, True):
        tokens = [
            sum(run.length for run in held if (segments[run.segment].prefix is not None) == riding)
            for held in shard_by_tokens(segments, 4)
        ]
        assert max(tokens) - min(tokens) <= 0.08 * sum(tokens) / 4 + 1


def test_balance_is_by_work_where_tokens_tell_little() -> None:
    """Behind a long prompt every response token attends to all of it: equal shares of the line, not of the list."""
    segments = segments_of([(6000, [60] * 16)])
    shards = shard(segments, 4, WEIGHT)
    responses = [sum(run.length for run in held if segments[run.segment].prefix is not None) for held in shards]
    assert responses == [240] * 4
    prompts = [[run for run in held if segments[run.segment].prefix is None] for held in shards]
    assert [len(runs) for runs in prompts] == [2, 2, 2, 1]  # zigzag: the last rank's two chunks are neighbours


def test_short_sequences_stay_whole_and_cost_no_communication() -> None:
    """Beside a long one: only the long one's keys travel."""
    segments = segments_of([(5000, []), *[(40, [30] * 4)] * 8])
    plan = plan_attention(segments, shard(segments, 2, WEIGHT), 0)
    assert sum(map(block_size, plan.exports)) == 5000 * 3 // 4  # its last chunk is needed by nobody else
    short = segments_of([(40, [30] * 4)] * 8)
    assert plan_attention(short, shard(short, 4, WEIGHT), 0).exports == ((), (), (), ())


def test_a_shared_prompt_is_one_piece_for_all_responses() -> None:
    segments = segments_of([(50, [7, 7, 9])])
    whole = plan_attention(segments, shard(segments, 1, WEIGHT), 0)
    assert whole.own == (QuerySlice((50, 73), ((0, 50),)),)
    assert whole.run_lengths == (50, 7, 7, 9)


def test_one_sequence() -> None:
    assert plan_one_sequence(9) == AttentionPlan((9,), ((0, 9),), (), ((),), ((),), (9,), (9,))


def test_zigzag_by_hand() -> None:
    segments = [Segment(0, 800)]
    assert shard(segments, 2, WEIGHT) == (
        (SegmentRun(0, 0, 200), SegmentRun(0, 600, 800)),
        (SegmentRun(0, 200, 600),),
    )
