# SPDX-License-Identifier: Apache-2.0
"""The tensors of one micro-batch on one rank: only what belongs to the rank's own tokens.

Shapes: types.py; padding stands at the end. "Packed" positions are those in the whole micro-batch, before it is split
over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_rl.protocols import PositionRule
from megatron_rl.training.packing import Bin
from megatron_rl.types import MediaItem, Run, TrainSample
from model_providers.attention.segments import (
    AttentionPlan,
    plan_attention,
    plan_whole_attention,
    segments_of,
    shard,
    shard_by_tokens,
)


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
    media_rows [n]: rows that hold media tokens, of the slice that this rank embeds; media_index [n]: which token of
        `media` each is, these standing one behind the other; only items that have a token there are listed
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
    media_rows: Tensor
    media_index: Tensor
    media: tuple[MediaItem, ...]
    samples: tuple[int, ...]

    @property
    def num_response_tokens(self) -> int:
        return len(self.targets)


@dataclass(slots=True)
class _Packed:
    """A whole micro-batch in the making."""

    tokens: list[int] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    """int64 [3, tokens] of each prompt and of each response."""
    bundles: list[tuple[int, list[int]]] = field(default_factory=list)
    """Lengths of each prompt and of its responses."""
    predictors: list[int] = field(default_factory=list)
    """Packed position of the token that predicts each response token."""
    targets: list[int] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    media: list[tuple[MediaItem, Tensor]] = field(default_factory=list)
    """Each item with the packed positions int64 [n] of its tokens, ascending."""

    def add(self, samples: Sequence[TrainSample], position_ids: PositionRule) -> None:
        """Append a bundle: the prompt once, then every response."""
        prompt, start = samples[0].prompt, len(self.tokens)
        num_prompt, longest = len(prompt.token_ids), max(len(s.response_ids) for s in samples)
        positions = position_ids(num_prompt + longest, prompt.media, prompt.spans)  # of any response: they start alike
        self.media += [(item, start + places(runs)) for item, runs in zip(prompt.media, prompt.spans, strict=True)]
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
    part: RankSlice,
    position_ids: PositionRule,
) -> MicroBatch:
    """Pack bundles (indices into `samples`) one behind the other and keep the rows of the rank
    that `part` describes."""
    packed = _Packed()
    for members in bundles:
        packed.add([samples[i] for i in members], position_ids)
    segments = segments_of(packed.bundles)
    asking = _stretches(packed.predictors)
    if part.by_heads and part.num_ranks > 1:
        shards = shard_by_tokens(segments, part.num_ranks)
        attention, last_attention = (plan_whole_attention(segments, shards, q) for q in (None, asking))
    else:
        shards = shard(segments, part.num_ranks, part.attention_weight)
        attention, last_attention = (plan_attention(segments, shards, part.rank, q) for q in (None, asking))
    spans = [torch.arange(run.start, run.stop) for run in shards[part.rank]]
    here = torch.cat([torch.zeros(0, dtype=torch.int64), *spans])  # packed position of each row
    padding = -len(here) % part.pad_multiple or (part.pad_multiple if not len(here) else 0)
    row_of = torch.full((len(packed.tokens),), -1)
    row_of[here] = torch.arange(len(here))

    rows = row_of[torch.tensor(packed.predictors, dtype=torch.int64)]
    mine = (rows >= 0).nonzero().squeeze(1)
    predicting_rows, predictors = rows[mine].unique(return_inverse=True)
    num_embedded = (len(here) + padding) // part.num_slices
    first = part.slice_rank * num_embedded
    media, media_rows, media_index = _media_here(packed, row_of, first, first + num_embedded)
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
        media_rows=media_rows,
        media_index=media_index,
        media=media,
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


def places(runs: Sequence[Run]) -> Tensor:
    """int64 [tokens in the runs]: every index in the runs, in their order."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _media_here(packed: _Packed, row_of: Tensor, first: int, last: int) -> tuple[tuple[MediaItem, ...], Tensor, Tensor]:
    """(media, media_rows [n], media_index [n]) of the rows [first, last)."""
    media, rows, indices = [], [], []
    offset = 0
    for item, packed_places in packed.media:
        found = row_of[packed_places]
        here = ((found >= first) & (found < last)).nonzero().squeeze(1)
        if len(here):
            media.append(item)
            rows.append(found[here])
            indices.append(here + offset)
            offset += item.num_tokens
    none = torch.zeros(0, dtype=torch.int64)
    return tuple(media), torch.cat([none, *rows]), torch.cat([none, *indices])


def localize(batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], dict[str, tuple[tuple[int, int], ...]]]:
    """The same micro-batches over tables that hold their own media tokens only, and what stands in these tables.

    {key: runs [start, stop) of its tokens}, ascending; the table of an item has one row for each of them.
    """
    held: dict[str, Tensor] = {}
    for batch in batches:
        for item, tokens in _tokens_by_item(batch):
            held.setdefault(item.key, torch.zeros(item.num_tokens, dtype=torch.bool))[tokens] = True
    row_of = {key: mask.cumsum(0) - 1 for key, mask in held.items()}
    local = []
    for batch in batches:
        offset, index = 0, [torch.zeros(0, dtype=torch.int64)]
        for item, tokens in _tokens_by_item(batch):
            index.append(row_of[item.key][tokens] + offset)
            offset += int(held[item.key].sum())
        local.append(replace(batch, media_index=torch.cat(index)))
    return local, {key: _runs(mask) for key, mask in held.items()}


def _tokens_by_item(batch: MicroBatch) -> Iterator[tuple[MediaItem, Tensor]]:
    """Which tokens of each of `batch.media` stand in it, in the order of the rows."""
    first = 0
    for item in batch.media:
        here = (batch.media_index >= first) & (batch.media_index < first + item.num_tokens)
        yield item, batch.media_index[here] - first
        first += item.num_tokens


def _runs(mask: Tensor) -> tuple[tuple[int, int], ...]:
    outside = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(mask.to(torch.int8), prepend=outside, append=outside)
    starts, stops = (edges == 1).nonzero().squeeze(1), (edges == -1).nonzero().squeeze(1)
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def gather_embeds(batch: MicroBatch, embeds: Mapping[str, Tensor]) -> Tensor | None:
    """[n, width] in the order of `batch.media_rows`; None where no media token stands."""
    if not batch.media:
        return None
    whole = torch.cat([embeds[item.key] for item in batch.media])
    return whole if len(batch.media_index) == len(whole) else whole[batch.media_index.to(whole.device)]
