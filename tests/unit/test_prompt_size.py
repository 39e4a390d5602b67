# SPDX-License-Identifier: Apache-2.0
"""Prompts of very long videos are small where they travel and where they are kept, and come back exactly."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_rl.rollout.store import RolloutStore
from megatron_rl.types import Group, MediaItem, Prompt, Row

NUM_FRAMES, TOKENS_PER_UNIT = 4096, 122
MOST_BYTES = 20_000


def _prompt(indices: tuple[int, ...], timestamps: tuple[float, ...]) -> Prompt:
    """249,856 tokens of one video, and text around it."""
    num_tokens = NUM_FRAMES // 2 * TOKENS_PER_UNIT
    grid = (NUM_FRAMES // 2, 14, 14)
    item = MediaItem(
        "5e" * 32, "/films/a.mp4", indices, timestamps, (196, 196), grid, 0.7, num_tokens, NUM_FRAMES, 2, 122
    )
    text = tuple(random.Random(0).sample(range(150_000), 200))
    ids = (*text, *[151_656] * num_tokens, *text)
    return Prompt(7, Row("train.jsonl:8", "What?", "A", (item.path,)), ids, (item,), (((200, 200 + num_tokens),),))


def _clock(ticks_a_second: int, jitter: bool) -> Prompt:
    """Every seventh frame of 29.97 a second or, with jitter, one of two neighbours; times as a container has them."""
    rng = random.Random(1)
    indices = tuple(7 * n + (rng.randrange(2) if jitter else 0) for n in range(NUM_FRAMES))
    tick = 1 / ticks_a_second
    times = tuple(round(Fraction(1001 * index * ticks_a_second, 30_000)) * tick for index in indices)
    return _prompt(indices, times)


@pytest.mark.parametrize("ticks_a_second", [1000, 15_360, 30_000, 90_000])
@pytest.mark.parametrize("jitter", [False, True])
def test_a_prompt_of_a_quarter_million_tokens_travels_in_a_few_kilobytes(ticks_a_second: int, jitter: bool) -> None:
    prompt = _clock(ticks_a_second, jitter)
    packed = pickle.dumps(prompt)
    assert len(packed) < MOST_BYTES
    assert pickle.loads(packed) == prompt


@pytest.mark.parametrize("seed", range(3))
def test_times_on_no_clock_come_back_to_the_bit(seed: int) -> None:
    rng = random.Random(seed)
    times = tuple(sorted(rng.uniform(0.0, 1e5) * 10.0 ** rng.randrange(-9, 3) for _ in range(NUM_FRAMES)))
    prompt = _prompt(tuple(rng.randrange(10**9) for _ in range(NUM_FRAMES)), times)
    assert pickle.loads(pickle.dumps(prompt)) == prompt


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "times",
    [
        (),
        (-0.0, 0.0),
        (1 / 3,) * 20,
        tuple(1 + n * 1e-9 for n in range(40)),
        (1e15, 1e18, 1e19, 1e25),
        (1.7976931348623157e308, -1.7976931348623157e308),
        (5e-324, 1e-310),
        (0.0, 1e-9, 1e18, 0.1, 2.0**53 + 2),
    ],
)
def test_odd_times_come_back_to_the_bit_without_a_warning(times: tuple[float, ...]) -> None:
    item = replace(_clock(1000, jitter=False).media[0], timestamps=times)
    again = pickle.loads(pickle.dumps(item))
    assert again == item and list(map(str, again.timestamps)) == list(map(str, times)), "-0.0 equals 0.0"


def test_text_and_nothing_at_all_come_back() -> None:
    for ids in ((), (5,), (2**40, 0, 3)):
        prompt = Prompt(0, Row("a:1", "", ""), ids)
        assert pickle.loads(pickle.dumps(prompt)) == prompt


def test_a_rollout_file_holds_equal_tokens_once(tmp_path: Path) -> None:
    prompt = _clock(90_000, jitter=False)
    store = RolloutStore(tmp_path, writes=True)
    store.save(0, [Group(prompt, ())])
    written = json.loads((tmp_path / "step_0.jsonl").read_text())["prompt"]["token_ids"]
    assert written[:200] == list(prompt.token_ids[:200]) and written[200] == [151_656, 249_856]
    assert store.load(0) == [Group(prompt, ())]


def test_rollouts_of_an_older_version_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """They held all token ids as they are, and media under `videos`."""
    row = {"source": "a:1", "problem": "p", "answer": "A", "videos": [], "problem_type": "", "images": []}
    row |= {"span": [0.0, float("inf")], "audios": []}
    prompt = {"prompt_id": 3, "row": row, "token_ids": [4, 4, 4, 9], "videos": []}
    path = tmp_path / "step_0.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "scored": []}) + "\n")
    [group] = RolloutStore(tmp_path, writes=False).load(0)
    assert group.prompt == Prompt(3, Row("a:1", "p", "A"), (4, 4, 4, 9))
    path.write_text(json.dumps({"prompt": {**prompt, "videos": [{"key": "x"}]}, "scored": []}) + "\n")
    with pytest.raises(ValueError, match=r"replay_from=.*: step_0.jsonl is of an older version.*; sample again"):
        RolloutStore(tmp_path, writes=False).load(0)
