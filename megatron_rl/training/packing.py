# SPDX-License-Identifier: Apache-2.0
"""Samples -> packed micro-batches, balanced over data parallel ranks by attention cost.

Every rank computes the same plan from the same samples, then builds the tensors of its own part. All data parallel
ranks get equally many micro-batches; a micro-batch may be empty (padding only) where there is nothing left to give.
Shapes: T packed tokens, R response tokens, n video tokens.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.types import TrainSample, VideoArtifact

PositionIds = Callable[[Sequence[int], Sequence[VideoArtifact]], Tensor]
VideoStarts = Callable[[Sequence[int], Sequence[VideoArtifact]], list[int]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed forward pass. Per-token fields [T]; per-response-token fields [R]; `samples` indexes the step's
    samples."""

    token_ids: Tensor
    position_ids: Tensor
    segments: tuple[int, ...]
    logit_rows: Tensor
    targets: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    weights: Tensor
    video_rows: Tensor
    videos: tuple[VideoArtifact, ...]
    samples: tuple[int, ...]

    @property
    def num_response_tokens(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Which samples go into which micro-batch of which data parallel rank: `bins[dp][microbatch]` = sample indices."""

    bins: tuple[tuple[tuple[int, ...], ...], ...]


def sequence_cost(length: int, hidden_size: int) -> float:
    """Work of one causal sequence in units of one token's linear layers: attention adds length / (12 * hidden) a token.

    A layer costs about 24 * H**2 FLOPs a token in its linears and 2 * length * H in causal attention.
    """
    return length * (1.0 + length / (12.0 * hidden_size))


def plan_packing(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, hidden_size: int, multiple: int = 1
) -> PackPlan:
    """Fewest micro-batches per rank that respect `max_tokens`, with cost spread by longest-first greedy assignment.

    Their number is a multiple of `multiple`: the interleaved pipeline schedule wants one of the pipeline size.
    """
    too_long = [n for n in lengths if n > max_tokens]
    if too_long:
        raise ValueError(
            f"train.max_tokens_per_microbatch={max_tokens}: {len(too_long)} sequences are longer (up to "
            f"{max(too_long)} tokens); raise it or lower data.max_prompt_tokens / rollout.max_response_tokens"
        )
    fewest = max(1, -(-sum(lengths) // (max_tokens * num_ranks)))
    for per_rank in itertools.count(-(-fewest // multiple) * multiple, multiple):
        bins = _fill(lengths, num_ranks * per_rank, max_tokens, hidden_size)
        if bins is not None:
            return PackPlan(_deal(bins, lengths, num_ranks, per_rank, hidden_size))
    raise AssertionError("unreachable: one sequence a bin always fits")


def _fill(lengths: Sequence[int], num_bins: int, max_tokens: int, hidden_size: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest bin with room; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, costs = [0] * num_bins, [0.0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [b for b in range(num_bins) if tokens[b] + lengths[index] <= max_tokens]
        if not room:
            return None
        best = min(room, key=lambda b: (costs[b], b))
        bins[best].append(index)
        tokens[best] += lengths[index]
        costs[best] += sequence_cost(lengths[index], hidden_size)
    return bins


def _deal(
    bins: list[list[int]], lengths: Sequence[int], num_ranks: int, per_rank: int, hidden_size: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Hand every rank `per_rank` bins, most expensive first to the rank with the least work."""

    def cost(members: list[int]) -> float:
        return sum(sequence_cost(lengths[i], hidden_size) for i in members)

    hands: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for members in sorted(bins, key=cost, reverse=True):
        load, rank = heapq.heappop(heap)
        hands[rank].append(tuple(members))
        if len(hands[rank]) < per_rank:
            heapq.heappush(heap, (load + cost(members), rank))
    return tuple(tuple(hand) for hand in hands)


def build_microbatch(
    samples: Sequence[TrainSample],
    members: Sequence[int],
    pad_multiple: int,
    position_ids: PositionIds,
    video_starts: VideoStarts,
) -> MicroBatch:
    """Pack `members` of `samples` one behind the other and pad the end to `pad_multiple` with a segment of its own."""
    tokens: list[int] = []
    segments, positions, logit_rows, targets, video_rows = [], [], [], [], []
    advantages, rollout_logprobs, weights = [], [], []
    videos: list[VideoArtifact] = []
    for index in members:
        sample, start = samples[index], len(tokens)
        prompt, response = sample.prompt.token_ids, sample.response_ids
        ids = (*prompt, *response)
        tokens.extend(ids)
        segments.append(len(ids))
        positions.append(position_ids(ids, sample.prompt.videos))
        first = start + len(prompt) - 1  # the last prompt token predicts the first response token
        logit_rows.extend(range(first, first + len(response)))
        targets.extend(response)
        advantages.extend([sample.advantage] * len(response))
        rollout_logprobs.extend(sample.rollout_logprobs)
        weights.extend([sample.weight] * len(response))
        for video, row in zip(sample.prompt.videos, video_starts(ids, sample.prompt.videos), strict=True):
            video_rows.extend(range(start + row, start + row + video.num_tokens))
            videos.append(video)
    padding = -len(tokens) % pad_multiple or (pad_multiple if not tokens else 0)
    if padding:
        tokens.extend([0] * padding)
        segments.append(padding)
        positions.append(torch.arange(padding).expand(3, -1))
    return MicroBatch(
        token_ids=torch.tensor(tokens),
        position_ids=torch.cat(positions, dim=1),
        segments=tuple(segments),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        rollout_logprobs=torch.tensor(rollout_logprobs, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        video_rows=torch.tensor(video_rows, dtype=torch.int64),
        videos=tuple(videos),
        samples=tuple(members),
    )


def gather_embeds(batch: MicroBatch, embeds: Mapping[str, Tensor]) -> Tensor | None:
    """[n, H] in the order of `batch.video_rows`; None for a batch without video."""
    return torch.cat([embeds[v.key] for v in batch.videos]) if batch.videos else None
