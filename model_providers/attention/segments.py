# SPDX-License-Identifier: Apache-2.0
"""Which token attends to which, and which context parallel rank holds it. Pure arithmetic on token numbers, no torch.

A micro-batch is a sequence of packed tokens, divided into segments. A segment attends to itself causally and, whole,
to at most one segment before it, its prefix: a prompt followed by N responses is one segment without a prefix and N
with it, so the prompt is stored and computed once. A plain sequence is one segment.

Under context parallelism each rank holds some runs (parts of one segment). What a rank must compute is then a list
of query slices: these queries against those keys, whole, beside each run against itself, causally.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

Interval = tuple[int, int]  # [start, stop)

MAX_TOKEN_EXCESS = 0.05  # tokens that a rank may hold above its fair share, where this makes the work equal
SPLIT_TOLERANCE = 0.025  # part of a rank's share of the work that it may lack or exceed to leave a segment whole


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed tokens [start, stop); `prefix` is the index of the segment that all of them attend to."""

    start: int
    stop: int
    prefix: int | None = None

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SegmentRun:
    """Packed tokens [start, stop) of one segment, held by one rank."""

    segment: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def segments_of(bundles: Iterable[tuple[int, Sequence[int]]]) -> list[Segment]:
    """Segments of bundles packed one behind the other, each a prompt length and the lengths of its responses. A prompt
    with one response is one plain sequence."""
    segments: list[Segment] = []
    position = 0
    for prompt, responses in bundles:
        if len(responses) == 1:
            lengths, prefix = [prompt + responses[0]], None
        else:
            lengths, prefix = list(responses), len(segments)
            segments.append(Segment(position, position + prompt))
            position += prompt
        for length in lengths:
            segments.append(Segment(position, position + length, prefix))
            position += length
    return segments


TokenShard = tuple[SegmentRun, ...]  # what one rank holds, in packed order; its rows are numbered from 0 in this order


@dataclass(frozen=True, slots=True)
class QuerySlice:
    """Queries `q` of this rank attend to all key rows `k` of a block."""

    q: Interval
    k: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The attention of one rank, of one layer, over one micro-batch.

    Queries are numbered from 0 among themselves: by their rows, where every row asks.

    run_lengths: its queries, run by run; each run attends to itself causally
    run_rows: the rows that these queries are
    own: its own queries against its own rows
    exports: rows of each rank that others need; all together, in order, they are the rank's block
    blocks: its own queries against the block of each rank
    rank_sizes: rows that each rank holds
    query_sizes: queries that each rank has
    """

    run_lengths: tuple[int, ...]
    run_rows: tuple[Interval, ...]
    own: tuple[QuerySlice, ...]
    exports: tuple[tuple[Interval, ...], ...]
    blocks: tuple[tuple[QuerySlice, ...], ...]
    rank_sizes: tuple[int, ...]
    query_sizes: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        return sum(self.run_lengths)


def block_size(exports: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in exports)


# --------------------------------------------------------------------------------------------- who holds which tokens


def shard(segments: Sequence[Segment], num_ranks: int, attention_weight: float) -> tuple[TokenShard, ...]:
    """Distribute the tokens so that every rank has equal work and, within 5 %, equally many of them.

    A token's work is 1 + attention_weight * (number of tokens it attends to). The sequences (a prompt and its responses
    count as one), one behind the other, are divided into parts of equal work, between two sequences where possible: a
    sequence on one rank costs no communication. Where this leaves the tokens uneven, the sequences of most work are
    taken out, and each is spread over all ranks by itself.
    """
    sequences = _sequences(segments)
    work = [sum(_work(segments, i, segments[i].length, attention_weight) for i in members) for members in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (-work[i], i))
    shards: tuple[TokenShard, ...] = ()
    for num_spread in range(len(sequences) + 1):
        spread = order[:num_spread]
        line = [i for number, members in enumerate(sequences) if number not in spread for i in members]
        held = _share_out(segments, line, num_ranks, attention_weight)
        for number in spread:
            more = _spread(segments, sequences[number], num_ranks, attention_weight)
            held = [[*runs, *others] for runs, others in zip(held, more, strict=True)]
        shards = tuple(tuple(_joined(sorted(runs, key=lambda run: run.start))) for runs in held)
        if _is_even(shards):
            break
    return shards


def shard_by_tokens(segments: Sequence[Segment], num_ranks: int) -> tuple[TokenShard, ...]:
    """Distribute the tokens for all-to-all over heads, where all of them are sent whatever rank holds them: to every
    rank equally many of prompts and plain sequences, and equally many of responses, which the last layer computes
    alone."""
    responses = [i for i, segment in enumerate(segments) if segment.prefix is not None]
    others = [i for i, segment in enumerate(segments) if segment.prefix is None]
    held = zip(*(_share_out(segments, line, num_ranks, 0.0) for line in (others, responses)), strict=True)
    return tuple(tuple(_joined(sorted((*a, *b), key=lambda run: run.start))) for a, b in held)


def _sequences(segments: Sequence[Segment]) -> list[list[int]]:
    """Indices of each segment without prefix, with those of the segments that it is the prefix of."""
    members: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        members.setdefault(index if segment.prefix is None else segment.prefix, []).append(index)
    return list(members.values())


def _spread(
    segments: Sequence[Segment], members: Sequence[int], num_ranks: int, weight: float
) -> list[list[SegmentRun]]:
    """A sequence over all ranks: the prompt in zigzag (of 2 n chunks, rank r takes r and 2 n - 1 - r, which is even in
    tokens and in work), the responses whole where that is even too, otherwise in zigzag as well."""
    prompt, *responses = members
    held = _share_out(segments, responses, num_ranks, weight)
    if not _is_even(held):
        held = [[] for _ in range(num_ranks)]
        for index in responses:
            _zigzag(index, segments[index], held)
    _zigzag(prompt, segments[prompt], held)
    return held


def _is_even(held: Sequence[Sequence[SegmentRun]]) -> bool:
    tokens = [sum(run.length for run in runs) for runs in held]
    return max(tokens) <= math.ceil(sum(tokens) / len(held) * (1 + MAX_TOKEN_EXCESS))


def _zigzag(index: int, segment: Segment, held: Sequence[list[SegmentRun]]) -> None:
    num_chunks = 2 * len(held)
    bounds = [segment.start + segment.length * i // num_chunks for i in range(num_chunks + 1)]
    for chunk, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            held[min(chunk, num_chunks - 1 - chunk)].append(SegmentRun(index, start, stop))


def _share_out(
    segments: Sequence[Segment], line: Sequence[int], num_ranks: int, weight: float
) -> list[list[SegmentRun]]:
    """Divide the segments of `line`, one behind the other, into `num_ranks` parts of equal work."""
    works = [_work(segments, i, segments[i].length, weight) for i in line]
    share = sum(works) / num_ranks
    held: list[list[SegmentRun]] = [[] for _ in range(num_ranks)]
    rank, room = 0, share
    for index, work in zip(line, works, strict=True):
        segment, start = segments[index], segments[index].start
        done = 0.0
        while rank < num_ranks - 1 and work - done > room + SPLIT_TOLERANCE * share:
            stop = segment.start + _tokens_worth(segments, index, max(0.0, done + room), weight)
            if room > SPLIT_TOLERANCE * share and stop > start:
                held[rank].append(SegmentRun(index, start, stop))
                worth = _work(segments, index, stop - segment.start, weight)
                start, done, room = stop, worth, room - (worth - done)
            rank, room = rank + 1, room + share
        if segment.stop > start:
            held[rank].append(SegmentRun(index, start, segment.stop))
        room -= work - done
    return held


def _work(segments: Sequence[Segment], index: int, num_tokens: int, weight: float) -> float:
    """Work of the first `num_tokens` tokens of a segment."""
    return num_tokens * _first_work(segments, index, weight) + weight * num_tokens**2 / 2


def _first_work(segments: Sequence[Segment], index: int, weight: float) -> float:
    prefix = segments[index].prefix
    return 1.0 + weight * (segments[prefix].length if prefix is not None else 0)


def _tokens_worth(segments: Sequence[Segment], index: int, work: float, weight: float) -> int:
    """The inverse of `_work`, rounded."""
    first = _first_work(segments, index, weight)
    exact = work / first if weight == 0 else (math.sqrt(first**2 + 2 * weight * work) - first) / weight
    return min(segments[index].length, max(0, round(exact)))


def _joined(runs: Iterable[SegmentRun]) -> Iterator[SegmentRun]:
    """Runs that continue each other become one."""
    last: SegmentRun | None = None
    for run in runs:
        if last is not None and last.segment == run.segment and last.stop == run.start:
            last = SegmentRun(run.segment, last.start, run.stop)
        else:
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


# ------------------------------------------------------------------------------------------------ who attends to whom


def plan_attention(
    segments: Sequence[Segment], shards: Sequence[TokenShard], rank: int, queries: Sequence[Interval] | None = None
) -> AttentionPlan:
    """The plan of `rank` where keys and values are sent (ring, all-gather).

    `queries`: the packed tokens that ask, ascending intervals; all of them by default. In the last layer only those
    need to ask that predict something, though all of them are attended to.
    """
    asking = [_within(runs, queries) for runs in shards]
    rows = [_rows(runs) for runs in shards]
    exported = [_exported(segments, shards[origin], asking, origin) for origin in range(len(shards))]
    blocks = []
    for origin, runs in enumerate(exported):
        with_rows, offset = [], 0
        for run in runs:
            with_rows.append((run, offset))
            offset += run.length
        blocks.append(_query_slices(segments, asking[rank], with_rows) if origin != rank else ())
    own = list(_split(shards[rank], asking[rank]))
    row_of = _rows(own)
    return AttentionPlan(
        run_lengths=tuple(run.length for run in asking[rank]),
        run_rows=_merged((row_of[run], row_of[run] + run.length) for run in asking[rank]),
        own=_query_slices(segments, asking[rank], [(run, row_of[run]) for run in own]),
        exports=tuple(
            _merged((rows[origin][run], rows[origin][run] + run.length) for run in runs)
            for origin, runs in enumerate(exported)
        ),
        blocks=tuple(blocks),
        rank_sizes=tuple(map(_size, shards)),
        query_sizes=tuple(map(_size, asking)),
    )


def plan_one_sequence(num_tokens: int, queries: Sequence[Interval] | None = None) -> AttentionPlan:
    """One causal sequence on one rank."""
    return plan_attention([Segment(0, num_tokens)], [(SegmentRun(0, 0, num_tokens),)], 0, queries)


def plan_whole_attention(
    segments: Sequence[Segment], shards: Sequence[TokenShard], queries: Sequence[Interval] | None = None
) -> AttentionPlan:
    """The plan of a rank that sees the tokens of all ranks, one rank behind the other (all-to-all over heads)."""
    everything = tuple(_joined(run for runs in shards for run in runs))
    nothing = ((),) * len(shards)
    return replace(
        plan_attention(segments, [everything], 0, queries),
        exports=nothing,
        blocks=nothing,
        rank_sizes=tuple(map(_size, shards)),
        query_sizes=tuple(_size(_within(runs, queries)) for runs in shards),
    )


def _size(runs: TokenShard) -> int:
    return sum(run.length for run in runs)


def _within(runs: TokenShard, intervals: Sequence[Interval] | None) -> TokenShard:
    """The parts of a rank's runs that lie in `intervals` (ascending; None is everywhere)."""
    if intervals is None:
        return runs
    parts = []
    for run in runs:
        for start, stop in intervals[bisect_right(intervals, run.start, key=itemgetter(1)) :]:
            if start >= run.stop:
                break
            parts.append(SegmentRun(run.segment, max(start, run.start), min(stop, run.stop)))
    return tuple(parts)


def _split(runs: TokenShard, parts: TokenShard) -> Iterator[SegmentRun]:
    """The runs of `runs`, divided where one of its `parts` starts or ends."""
    parts_of: dict[int, list[SegmentRun]] = {}
    for part in parts:
        parts_of.setdefault(part.segment, []).append(part)
    for run in runs:
        inside = [p for p in parts_of.get(run.segment, []) if run.start <= p.start and p.stop <= run.stop]
        edges = sorted({run.start, run.stop, *(edge for part in inside for edge in (part.start, part.stop))})
        yield from (SegmentRun(run.segment, *bounds) for bounds in itertools.pairwise(edges))


def _rows(runs: Iterable[SegmentRun]) -> dict[SegmentRun, int]:
    """First row of each run."""
    runs = list(runs)
    starts = itertools.accumulate((run.length for run in runs), initial=0)
    return dict(zip(runs, starts, strict=False))


def _exported(
    segments: Sequence[Segment], held: TokenShard, asking: Sequence[TokenShard], origin: int
) -> list[SegmentRun]:
    """Runs held by `origin` that some other rank attends to."""
    last_start: dict[tuple[int, int], int] = {}
    asking_ranks: dict[int, set[int]] = {}
    for rank, runs in enumerate(asking):
        for run in runs:
            last_start[run.segment, rank] = max(run.start, last_start.get((run.segment, rank), -1))
            prefix = segments[run.segment].prefix
            if prefix is not None:
                asking_ranks.setdefault(prefix, set()).add(rank)
    others = [rank for rank in range(len(asking)) if rank != origin]
    return [
        run
        for run in held
        if asking_ranks.get(run.segment, set()) - {origin}
        or any(last_start.get((run.segment, rank), -1) >= run.stop for rank in others)
    ]


def _query_slices(
    segments: Sequence[Segment], asking: TokenShard, block: Sequence[tuple[SegmentRun, int]]
) -> tuple[QuerySlice, ...]:
    """The queries `asking` against the runs of a block, given with their first rows. The causal part is left out."""
    by_segment: dict[int, list[tuple[SegmentRun, int]]] = {}
    for run, row in block:
        by_segment.setdefault(run.segment, []).append((run, row))
    slices: list[QuerySlice] = []
    row = 0
    for run in asking:
        prefix = segments[run.segment].prefix
        before = by_segment.get(prefix, []) if prefix is not None else []
        earlier = [(key, at) for key, at in by_segment.get(run.segment, []) if key.stop <= run.start]
        keys = _merged(sorted((at, at + key.length) for key, at in [*before, *earlier]))
        q = (row, row + run.length)
        row = q[1]
        if not keys:
            continue
        if slices and slices[-1].k == keys and slices[-1].q[1] == q[0]:
            slices[-1] = QuerySlice((slices[-1].q[0], q[1]), keys)
        else:
            slices.append(QuerySlice(q, keys))
    return tuple(slices)


def _merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Neighbours that touch become one."""
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
