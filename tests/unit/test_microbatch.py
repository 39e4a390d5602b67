# SPDX-License-Identifier: Apache-2.0
"""Micro-batches computed by hand: whole, with a shared prompt, and split over context parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_rl.training.microbatch import MicroBatch, RankSlice, build_microbatch, gather_embeds
from megatron_rl.types import MediaItem, Prompt, Row, Run, TrainSample
from model_providers.attention.segments import QuerySlice
from tests.media_items import made_video

V = 9  # placeholder token


def _video(key: str, num_tokens: int) -> MediaItem:
    return made_video(key, (1, 2, 2 * num_tokens), num_tokens)


def _sample(prompt: Sequence[int], response: Sequence[int], weight: float, *videos: MediaItem) -> TrainSample:
    row = Row("made:1", "", "")
    logprobs = tuple(-0.5 * (i + 1) for i in range(len(response)))
    spans, at = [], 1  # media follow the first token, with one token between them
    for video in videos:
        spans.append(((at, at + video.num_tokens),))
        at += video.num_tokens + 1
    made = Prompt(0, row, tuple(prompt), videos, tuple(spans))
    return TrainSample(made, tuple(response), logprobs, weight=weight)


def _positions(num_tokens: int, media: Sequence[MediaItem], spans: Sequence[Sequence[Run]]) -> Tensor:
    """Recognisable: the sample is told by its media."""
    return (len(media) + 1) * 100 + torch.arange(num_tokens).expand(3, -1)


def _predicting(batch: MicroBatch) -> Tensor:
    """The row that predicts each response token."""
    return batch.predicting_rows[batch.predictors]


A, B = _video("a", 2), _video("b", 1)
SAMPLES = [
    _sample([1, 1], [5], 1.0),
    _sample([2, V, V, 3], [6, 7, 8], 0.5, A),
    _sample([3, V, 4, V, V, 3], [4, 4], 1.5, B, A),
]


def test_micro_batch_by_hand() -> None:
    batch = build_microbatch(SAMPLES, ((2,), (1,)), RankSlice(pad_multiple=8), _positions)
    assert batch.token_ids.tolist() == [3, V, 4, V, V, 3, 4, 4, 2, V, V, 3, 6, 7, 8, 0]
    assert batch.attention.run_lengths == (8, 7) and batch.attention.own == ()
    assert batch.position_ids.tolist() == [[*range(300, 308), *range(200, 207), 0]] * 3  # the last one is padding
    assert _predicting(batch).tolist() == [5, 6, 11, 12, 13]  # the position before each response token
    assert batch.targets.tolist() == [4, 4, 6, 7, 8]
    assert batch.rollout_logprobs.tolist() == [-0.5, -1.0, -0.5, -1.0, -1.5]
    assert batch.weights.tolist() == [1.5, 1.5, 0.5, 0.5, 0.5]
    assert batch.media_rows.tolist() == [1, 3, 4, 9, 10]
    assert batch.media == (B, A, A)
    assert batch.samples == (2, 1)
    assert batch.num_response_tokens == 5
    assert torch.equal(batch.token_ids[_predicting(batch) + 1], batch.targets)


def test_embeddings_come_in_the_order_of_the_media_rows() -> None:
    batch = build_microbatch(SAMPLES, ((2,), (1,)), RankSlice(), _positions)
    embeds = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0]])}
    gathered = gather_embeds(batch, embeds)
    assert gathered is not None and gathered[:, 0].tolist() == [3.0, 1.0, 2.0, 1.0, 2.0]
    assert gather_embeds(build_microbatch(SAMPLES, ((0,),), RankSlice(), _positions), embeds) is None


GROUP = [_sample([1, V, V, 3], [5, 6], 1.0, A), _sample([1, V, V, 3], [7, 8, 9], 0.5, A)]


def test_a_shared_prompt_is_stored_once() -> None:
    batch = build_microbatch(GROUP, ((0, 1),), RankSlice(), _positions)
    assert batch.token_ids.tolist() == [1, V, V, 3, 5, 6, 7, 8, 9]
    assert batch.position_ids[0].tolist() == [
        200,
        201,
        202,
        203,
        204,
        205,
        204,
        205,
        206,
    ]  # both go on after the prompt
    assert batch.attention.run_lengths == (4, 2, 3)
    assert batch.attention.own == (QuerySlice((4, 9), ((0, 4),)),)
    assert _predicting(batch).tolist() == [3, 4, 3, 6, 7]  # the prompt's last token predicts two first tokens
    assert batch.predicting_rows.tolist() == [3, 4, 6, 7]  # no row of the prompt but its last, no last token
    assert batch.last_attention.run_lengths == (1, 1, 2)
    assert batch.last_attention.own == (QuerySlice((0, 1), ((0, 3),)), QuerySlice((1, 4), ((0, 4),)))
    assert batch.targets.tolist() == [5, 6, 7, 8, 9]
    assert batch.media_rows.tolist() == [1, 2] and batch.media == (A,) and batch.samples == (0, 1)


def test_context_parallel_ranks_hold_everything_once() -> None:
    whole = build_microbatch([*GROUP, *SAMPLES], ((0, 1), (4,), (3,)), RankSlice(), _positions)
    parts = [
        build_microbatch([*GROUP, *SAMPLES], ((0, 1), (4,), (3,)), RankSlice(rank, 3, 2, 0.01), _positions)
        for rank in range(3)
    ]
    assert sum(part.attention.num_queries for part in parts) == len(whole.token_ids)
    embeds = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0]])}
    seen: dict[int, tuple[float, ...]] = {}
    for part in parts:
        assert len(part.token_ids) == part.position_ids.shape[1] and len(part.token_ids) % 2 == 0
        fields = (
            part.targets,
            part.rollout_logprobs,
            part.weights,
            part.position_ids[0, _predicting(part)],
        )
        for index, *values in zip(part.response_index.tolist(), *(f.tolist() for f in fields), strict=True):
            seen[index] = tuple(values)
        made = gather_embeds(part, embeds)
        assert (made is None) == (len(part.media_rows) == 0)
        assert all(part.token_ids[part.media_rows] == V)
    fields = (
        whole.targets,
        whole.rollout_logprobs,
        whole.weights,
        whole.position_ids[0, _predicting(whole)],
    )
    assert [seen[i] for i in range(len(seen))] == list(zip(*(f.tolist() for f in fields), strict=True))
    rows = [
        (gather_embeds(part, embeds)[:, 0].tolist(), part.position_ids[0, part.media_rows].tolist())
        for part in parts
        if part.media
    ]
    pairs = sorted(pair for values, positions in rows for pair in zip(positions, values, strict=True))
    assert pairs == sorted(
        zip(whole.position_ids[0, whole.media_rows].tolist(), gather_embeds(whole, embeds)[:, 0].tolist(), strict=True)
    )


@pytest.mark.parametrize(("multiple", "num_rows"), [(1, 3), (3, 3), (4, 4)])
def test_padding_attends_to_nothing(multiple: int, num_rows: int) -> None:
    batch = build_microbatch(SAMPLES, ((0,),), RankSlice(pad_multiple=multiple), _positions)
    assert batch.attention.run_lengths == (3,) and len(batch.token_ids) == num_rows
    assert _predicting(batch).tolist() == [1]


@pytest.mark.parametrize(
    "part", [RankSlice(pad_multiple=4), RankSlice(1, 2, 4, 0.01), RankSlice(1, 2, 4, 0.01, by_heads=True)], ids=str
)
def test_an_empty_micro_batch_is_padding_only(part: RankSlice) -> None:
    batch = build_microbatch(SAMPLES, (), part, _positions)
    assert batch.token_ids.tolist() == [0] * 4 and batch.attention.num_queries == 0
    assert batch.position_ids.shape == (3, 4) and batch.num_response_tokens == 0
    assert _predicting(batch).dtype == batch.targets.dtype == torch.int64
