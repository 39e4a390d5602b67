# SPDX-License-Identifier: Apache-2.0
"""Who sends which tokens to whom: every plan is carried out on numbers and compared with what was asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_rl.media.routes import WantedTokens, plan_messages, split_over_ranks
from megatron_rl.types import MediaItem
from tests.media_items import made_video


def _video(key: str, grid_t: int, per_patch: int) -> MediaItem:
    return made_video(key, (grid_t, 2, 2 * per_patch), per_patch)


SOUND = replace(_video("d", 6, 4), kind="audio", num_tokens=22)  # the last unit is half as long
VIDEOS = [_video("a", 1, 3), _video("b", 29, 2), _video("c", 7, 5), SOUND]
BY_KEY = {video.key: video for video in VIDEOS}


def _requests(world: int, seed: int) -> list[WantedTokens]:
    """Random runs; the first rank asks for nothing, the last one for everything."""
    rng = random.Random(seed)
    requests: list[WantedTokens] = [{}]
    for _ in range(world - 2):
        wanted = {}
        for video in VIDEOS:
            cuts = sorted(rng.sample(range(video.num_tokens + 1), 4 if video.num_tokens > 3 else 2))
            wanted[video.key] = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        requests.append(wanted)
    return [*requests, {v.key: ((0, v.num_tokens),) for v in VIDEOS}][-world:]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("most", [None, 1, 4])
def test_everyone_gets_what_it_asked_for_in_order(world: int, most: int | None) -> None:
    chunks = split_over_ranks(VIDEOS, world, most and 2 * most)
    for seed in range(5):
        requests = _requests(world, seed)
        tables = [{key: {} for key in wanted} for wanted in requests]
        for messages in plan_messages(chunks, BY_KEY, requests):
            for m in messages:
                assert m.source == m.chunk.owner and m.start < m.stop
                first = m.chunk.start * BY_KEY[m.chunk.key].tokens_per_unit
                for row, token in zip(
                    range(m.at, m.in_table.stop), range(first + m.start, first + m.stop), strict=True
                ):
                    assert row not in tables[m.target][m.chunk.key], "a row that arrives twice"
                    tables[m.target][m.chunk.key][row] = token
        for wanted, table in zip(requests, tables, strict=True):
            expected = {key: [t for run in runs for t in range(*run)] for key, runs in wanted.items()}
            assert {key: [rows[i] for i in range(len(rows))] for key, rows in table.items()} == expected


@pytest.mark.parametrize("world", [2, 4, 7])
def test_a_rank_receives_one_chunk_a_round_and_the_ranks_do_not_queue(world: int) -> None:
    everything = [{v.key: ((0, v.num_tokens),) for v in VIDEOS}] * world
    rounds = plan_messages(split_over_ranks(VIDEOS, world, 4), BY_KEY, everything)
    for messages in rounds[1:]:
        for target in range(world):
            assert len({m.chunk for m in messages if m.target == target}) <= 1
        assert all(m.source != m.target for m in messages)
    assert {m.source for m in rounds[1]} == set(range(world)), "all turn to the same rank first"


@pytest.mark.parametrize(("most", "unit"), [(4, 1), (4, 3), (1, 3), (None, 8)])
def test_chunks_are_small_and_begin_at_multiples(most: int | None, unit: int) -> None:
    chunks = split_over_ranks(VIDEOS, 3, most and 2 * most, unit)
    for video in VIDEOS:
        mine = chunks[video.key]
        assert [p for chunk in mine for p in range(chunk.start, chunk.stop)] == list(range(video.grid_thw[0]))
        assert all(chunk.start % unit == 0 for chunk in mine)
        if most is not None:
            assert max(p.stop - p.start for p in mine) <= max(most // unit * unit, unit)
