# SPDX-License-Identifier: Apache-2.0
"""The tensors of one micro-batch, cut for one context parallel rank: only what stands on its own tokens.

Shapes: T tokens of this rank (padding included, at the end), R response tokens predicted by them, n video tokens
among them. "Packed" positions are those in the whole micro-batch, before it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_rl.training.packing import Bin
from megatron_rl.types import MediaItem, TrainSample
from model_providers.attention.segments import (
    AttentionPlan,
    plan_attention,
    plan_whole_attention,
    segments_of,
    shard,
    shard_by_tokens,
)

PositionIds = Callable[[Sequence[int], Sequence[MediaItem]], Tensor]
VideoStarts = Callable[[Sequence[int], Sequence[MediaItem]], list[int]]


@dataclass(frozen=True, slots=True)
class RankSlice:
    """Which part of a micro-batch a rank holds. `attention_weight` is that of `segments.shard`; with `by_heads` all
    ranks compute attention for all tokens, and only their number counts. `pad_multiple`: rows are padded to it.
    Under sequence parallelism `num_slices` ranks share the rows, and this one embeds the slice `slice_rank` of them."""

    rank: int = 0
    num_ranks: int = 1
    pad_multiple: int = 1
    slice_rank: int = 0
    num_slices: int = 1
    attention_weight: float = 0.0
    by_heads: bool = False


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of this rank. Per-token fields [T], position_ids [3, T]; per-response-token fields [R].

    predicting_rows [K]: the rows that predict response tokens, all that the last layer computes; last_attention: what
        these attend to; predictors [R]: which of them predicts each response token
    response_index [R]: which token of the micro-batch's responses each is, these standing one behind the other in the
        order of `samples` (indices of the step's samples)
    video_rows [n]: rows that hold video tokens, of the slice that this rank embeds; video_index [n]: which token of
        `videos` each is, these standing one behind the other; only videos that have a token there are listed
    """

    token_ids: Tensor
    position_ids: Tensor
    attention: AttentionPlan
    last_attention: AttentionPlan
    predicting_rows: Tensor
    predictors: Tensor
    targets: Tensor
    rollout_logprobs: Tensor
    weights: Tensor
    response_index: Tensor
    video_rows: Tensor
    video_index: Tensor
    videos: tuple[MediaItem, ...]
    samples: tuple[int, ...]

    @property
    def num_response_tokens(self) -> int:
        return len(self.targets)


@dataclass(slots=True)
class _Packed:
    """A whole micro-batch in the making."""

    tokens: list[int] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    bundles: list[tuple[int, list[int]]] = field(default_factory=list)
    """Lengths of each prompt and of its responses."""
    predictors: list[int] = field(default_factory=list)
    """Packed position of the token that predicts each response token."""
    targets: list[int] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    videos: list[tuple[MediaItem, int]] = field(default_factory=list)
    """Each video with the packed position of its first token."""

    def add(self, samples: Sequence[TrainSample], position_ids: PositionIds, video_starts: VideoStarts) -> None:
        """Append a bundle: the prompt once, then every response."""
        prompt, start = samples[0].prompt, len(self.tokens)
        longest = max((s.response_ids for s in samples), key=len)
        positions = position_ids((*prompt.token_ids, *longest), prompt.videos)  # of any response: they start alike
        num_prompt = len(prompt.token_ids)
        starts = video_starts(prompt.token_ids, prompt.videos)
        self.videos += [(video, start + at) for video, at in zip(prompt.videos, starts, strict=True)]
        self.tokens.extend(prompt.token_ids)
        self.positions.append(positions[:, :num_prompt])
        self.bundles.append((num_prompt, [len(s.response_ids) for s in samples]))
        for sample in samples:
            assert sample.prompt.token_ids == prompt.token_ids, "a bundle has one prompt"
            self._add_response(sample, last_prompt_token=start + num_prompt - 1)
            self.positions.append(positions[:, num_prompt : num_prompt + len(sample.response_ids)])

    def _add_response(self, sample: TrainSample, last_prompt_token: int) -> None:
        first, count = len(self.tokens), len(sample.response_ids)
        self.tokens.extend(sample.response_ids)
        self.predictors += [last_prompt_token, *range(first, first + count - 1)][:count]
        self.targets.extend(sample.response_ids)
        self.rollout_logprobs.extend(sample.rollout_logprobs)
        self.weights += [sample.weight] * count


def build_microbatch(
    samples: Sequence[TrainSample],
    bundles: Bin,
    cut: RankSlice,
    position_ids: PositionIds,
    video_starts: VideoStarts,
) -> MicroBatch:
    """Pack bundles (indices into `samples`) one behind the other and keep the rows of the rank of `cut`."""
    packed = _Packed()
    for members in bundles:
        packed.add([samples[i] for i in members], position_ids, video_starts)
    segments = segments_of(packed.bundles)
    asking = _stretches(packed.predictors)
    if cut.by_heads and cut.num_ranks > 1:
        shards = shard_by_tokens(segments, cut.num_ranks)
        attention, last_attention = (plan_whole_attention(segments, shards, q) for q in (None, asking))
    else:
        shards = shard(segments, cut.num_ranks, cut.attention_weight)
        attention, last_attention = (plan_attention(segments, shards, cut.rank, q) for q in (None, asking))
    spans = [torch.arange(run.start, run.stop) for run in shards[cut.rank]]
    here = torch.cat([torch.zeros(0, dtype=torch.int64), *spans])  # packed position of each row
    padding = -len(here) % cut.pad_multiple or (cut.pad_multiple if not len(here) else 0)
    row_of = torch.full((len(packed.tokens),), -1)
    row_of[here] = torch.arange(len(here))

    rows = row_of[torch.tensor(packed.predictors, dtype=torch.int64)]
    mine = (rows >= 0).nonzero().squeeze(1)
    predicting_rows, predictors = rows[mine].unique(return_inverse=True)
    num_embedded = (len(here) + padding) // cut.num_slices
    first = cut.slice_rank * num_embedded
    videos, video_rows, video_index = _videos_here(packed, row_of, first, first + num_embedded)
    positions = torch.cat([torch.zeros(3, 0, dtype=torch.int64), *packed.positions], dim=1)[:, here]
    return MicroBatch(
        token_ids=_padded(torch.tensor(packed.tokens, dtype=torch.int64)[here], padding),
        position_ids=_padded(positions, padding),
        attention=attention,
        last_attention=last_attention,
        predicting_rows=predicting_rows,
        predictors=predictors,
        targets=torch.tensor(packed.targets, dtype=torch.int64)[mine],
        rollout_logprobs=torch.tensor(packed.rollout_logprobs, dtype=torch.float32)[mine],
        weights=torch.tensor(packed.weights, dtype=torch.float32)[mine],
        response_index=mine,
        video_rows=video_rows,
        video_index=video_index,
        videos=videos,
        samples=tuple(i for members in bundles for i in members),
    )


def _stretches(packed_positions: Sequence[int]) -> list[tuple[int, int]]:
    """The distinct positions as ascending stretches [start, stop)."""
    if not packed_positions:
        return []
    positions = torch.tensor(packed_positions)
    mask = torch.zeros(int(positions.max()) + 1, dtype=torch.bool)
    mask[positions] = True
    return list(_runs(mask))


def _padded(tensor: Tensor, padding: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, padding))


def _videos_here(
    packed: _Packed, row_of: Tensor, first: int, last: int
) -> tuple[tuple[MediaItem, ...], Tensor, Tensor]:
    """(videos, video_rows, video_index) of the rows [first, last)."""
    videos, rows, indices = [], [], []
    offset = 0
    for video, start in packed.videos:
        found = row_of[start : start + video.num_tokens]
        here = ((found >= first) & (found < last)).nonzero().squeeze(1)
        if len(here):
            videos.append(video)
            rows.append(found[here])
            indices.append(here + offset)
            offset += video.num_tokens
    none = torch.zeros(0, dtype=torch.int64)
    return tuple(videos), torch.cat([none, *rows]), torch.cat([none, *indices])


def localize(batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], dict[str, tuple[tuple[int, int], ...]]]:
    """The same micro-batches over tables that hold their own video tokens only, and what stands in these tables.

    {video key: runs [start, stop) of its tokens}, ascending; the table of a video has one row for each of them.
    """
    held: dict[str, Tensor] = {}
    for batch in batches:
        for video, tokens in _tokens_by_video(batch):
            held.setdefault(video.key, torch.zeros(video.num_tokens, dtype=torch.bool))[tokens] = True
    row_of = {key: mask.cumsum(0) - 1 for key, mask in held.items()}
    local = []
    for batch in batches:
        offset, index = 0, [torch.zeros(0, dtype=torch.int64)]
        for video, tokens in _tokens_by_video(batch):
            index.append(row_of[video.key][tokens] + offset)
            offset += int(held[video.key].sum())
        local.append(replace(batch, video_index=torch.cat(index)))
    return local, {key: _runs(mask) for key, mask in held.items()}


def _tokens_by_video(batch: MicroBatch) -> Iterator[tuple[MediaItem, Tensor]]:
    """Which tokens of each of `batch.videos` stand in it, in the order of the rows."""
    first = 0
    for video in batch.videos:
        here = (batch.video_index >= first) & (batch.video_index < first + video.num_tokens)
        yield video, batch.video_index[here] - first
        first += video.num_tokens


def _runs(mask: Tensor) -> tuple[tuple[int, int], ...]:
    outside = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(mask.to(torch.int8), prepend=outside, append=outside)
    starts, stops = (edges == 1).nonzero().squeeze(1), (edges == -1).nonzero().squeeze(1)
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def gather_embeds(batch: MicroBatch, embeds: Mapping[str, Tensor]) -> Tensor | None:
    """[n, H] in the order of `batch.video_rows`; None where no video token stands."""
    if not batch.videos:
        return None
    whole = torch.cat([embeds[v.key] for v in batch.videos])
    return whole if len(batch.video_index) == len(whole) else whole[batch.video_index.to(whole.device)]
