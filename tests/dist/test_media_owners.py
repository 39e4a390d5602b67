# SPDX-License-Identifier: Apache-2.0
"""A rank of the trainer receives the embeddings of its own rows, whatever the layout, and computes what it would with
whole videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.training.batch import ScoredBatch, Update, pack
from megatron_rl.training.microbatch import MicroBatch, localize
from megatron_rl.training.token_learner import fetch_embeds
from megatron_rl.types import MediaEmbeds
from tests import tiny_policy as tp
from tests.vision_parts import open_cache
from tests.world import run_world

BUDGET = 400
Grid = tuple[int, int, int, int]  # tensor, pipeline, context, data


def _tokens(batches: Sequence[MicroBatch]) -> set[tuple[str, int]]:
    """(video, token) of every video token in the micro-batches."""
    found = set()
    for batch in batches:
        names = [(v.key, i) for v in batch.media for i in range(v.num_tokens)]
        found |= {names[i] for i in batch.media_index.tolist()}
    return found


def _measure(rank: int, folder: Path, grid: Grid) -> Any:
    """(log-probabilities by micro-batch with the rank's own tokens, with whole videos, counts, tokens asked for, tokens
    made here, patches of all videos, dtype size * hidden)."""
    tensor, pipeline, context, _ = grid
    trainer = tp.open_trainer(folder, tp.join(tensor, pipeline, context=context), tp.MEASURE)
    mesh, encoder = trainer.mesh, open_cache(folder)
    groups = tp.grouped_samples(trainer.provider)
    batches = pack(groups, 1, BUDGET, trainer.provider, mesh)[0].batches
    videos = list({v.key: v for group in groups for v in group[0].prompt.media}.values())
    assert encoder.encode(videos) == {}
    local, wanted = localize(batches)
    embeds = encoder.fetch_tokens(wanted if mesh.is_first_stage else {})
    counts = encoder.take_counts()
    if mesh.is_first_stage:
        assert {key: len(table) for key, table in embeds.tables.items()} == {
            key: sum(stop - start for start, stop in runs) for key, runs in wanted.items()
        }
    ours = trainer.policy.logprobs(local, embeds.tables)
    whole = trainer.policy.logprobs(batches, encoder.fetch(videos).tables)
    asked = _tokens(batches) if mesh.is_first_stage else set()
    made = {
        (p.key, t)
        for p in encoder._step.made
        for v in videos
        if v.key == p.key
        for t in range(p.start * (v.num_tokens // v.grid_thw[0]), p.stop * (v.num_tokens // v.grid_thw[0]))
    }
    _check_that_nothing_else_is_held(trainer, encoder, batches, embeds)
    return ours, whole, counts, asked, made, videos


def _check_that_nothing_else_is_held(
    trainer: tp.Trainer, encoder: ParallelEncoder, batches: list[MicroBatch], expected: MediaEmbeds
) -> None:
    """While a rank learns, it has the tokens of its own rows, and no longer what it made for others."""
    update = Update((), tuple(ScoredBatch(batch) for batch in batches))
    fetched = fetch_embeds(update, encoder, asks=trainer.mesh.is_first_stage).embeds
    encoder.release()
    assert fetched.tables.keys() == expected.tables.keys() and encoder._step.made == {}
    assert all(torch.equal(table, expected.tables[key]) for key, table in fetched.tables.items())


GRIDS: list[Grid] = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 4, 1), (2, 1, 2, 1), (2, 1, 1, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "tp{}_pp{}_cp{}_dp{}".format(*g))
def test_owners_alone_receive_a_token(tiny_checkpoint: Path, grid: Grid) -> None:
    tensor, pipeline, context, data = grid
    ranks = run_world(tensor * pipeline * context * data, _measure, tiny_checkpoint, grid)
    videos = ranks[0][-1]
    everything = {(v.key, t) for v in videos for t in range(v.num_tokens)}
    for ours, whole, counts, asked, made, _ in ranks:
        for a, b in zip(ours, whole, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert counts.received_bytes == len(asked - made) * tp.HIDDEN * 4, "not the least that had to move"
    assert set().union(*(asked for *_, asked, _, _ in ranks)) == everything
    assert sum(len(made) for *_, made, _ in ranks) == len(everything), "a token is made once"
    if data == 1:  # no two ranks embed the same row
        assert sum(len(asked) for *_, asked, _, _ in ranks) == len(everything)
    shares = [counts.encoded_patches for _, _, counts, *_ in ranks]
    most = max(v.grid_thw[1] * v.grid_thw[2] for v in videos)
    assert max(shares) <= sum(shares) / len(shares) + most


def test_localized_batches_index_small_tables(tiny_checkpoint: Path) -> None:
    """By hand: of ten tokens of a video, a rank holds 2, 3, 7 in one micro-batch and 3, 4 in another."""

    def batch(index: list[int]) -> MicroBatch:
        none = torch.zeros(0)
        rows = torch.arange(len(index))
        clip = tp.video("clip", (5, 2, 4))
        values: dict[str, Any] = dict.fromkeys(MicroBatch.__slots__, none)
        values |= {"media_rows": rows, "media_index": torch.tensor(index), "media": (clip,), "samples": ()}
        return MicroBatch(**values)

    local, wanted = localize([batch([2, 3, 7]), batch([3, 4])])
    assert wanted == {"clip": ((2, 5), (7, 8))}
    index: list[Tensor] = [b.media_index for b in local]
    assert [i.tolist() for i in index] == [[0, 1, 3], [1, 2]]
