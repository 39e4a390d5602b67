# SPDX-License-Identifier: Apache-2.0
"""Saved rollouts come back equal, and only onto the data they were sampled from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.rollout.store import RolloutStore
from megatron_rl.types import Completion, Group, MediaItem, Prompt, Row, Scored


def video(name: str) -> MediaItem:
    return MediaItem(
        key=f"sha-{name}",
        path=f"/data/{name}.mp4",
        frame_indices=(0, 3, 7, 7),
        timestamps=(0.0, 0.1, 1 / 3, 1 / 3),
        size_hw=(56, 84),
        grid_thw=(2, 4, 6),
        seconds_per_grid=2 / 3,
        num_tokens=12,
        num_frames=4,
        frames_per_unit=2,
        tokens_per_unit=6,
    )


def group(prompt_id: int, num_videos: int, num_samples: int = 2) -> Group:
    videos = tuple(video(f"{prompt_id}-{i}") for i in range(num_videos))
    row = Row(f"train.jsonl:{prompt_id}", "Wie heißt 猫?\u2028", "A", tuple(v.path for v in videos), "colour")
    scored = tuple(
        Scored(
            Completion(prompt_id, i, (5, 6, 7)[: i + 1], (-0.1, -1e-30, -3.3333333)[: i + 1], 'say "ja"\n', i == 1),
            reward=0.1 * i,
            parts={"overall": 0.1 * i, "format": 1.0},
        )
        for i in range(num_samples)
    )
    spans = tuple(((2 + 12 * i, 14 + 12 * i),) for i in range(num_videos))
    return Group(Prompt(prompt_id, row, (1, 2, *([9] * 12 * num_videos), 3), videos, spans), scored)


GROUPS = [group(0, 1), group(3, 0), group(1, 2), group(4, 0, num_samples=0)]


def test_round_trip_is_exact_and_keeps_the_order(tmp_path: Path) -> None:
    RolloutStore(tmp_path / "new" / "folder", writes=True).save(7, GROUPS)
    assert RolloutStore(tmp_path / "new" / "folder", writes=False).load(7) == GROUPS


def test_one_line_of_readable_json_per_group(tmp_path: Path) -> None:
    RolloutStore(tmp_path, writes=True).save(0, GROUPS)
    lines = (tmp_path / "step_0.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["prompt"]["prompt_id"] for line in lines[:-1]] == [0, 3, 1, 4]
    assert "heißt 猫" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0.jsonl"], "nothing half written is left"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    RolloutStore(tmp_path / "absent", writes=False).save(0, GROUPS)
    assert not (tmp_path / "absent").exists()


def test_missing_step_names_the_setting_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.replay_from=.*has no step_3\.jsonl"):
        RolloutStore(tmp_path, writes=True).load(3)


def test_unchanged_data_passes_in_any_order(tmp_path: Path) -> None:
    RolloutStore(tmp_path, writes=False).check_unchanged(GROUPS, [g.prompt for g in reversed(GROUPS)])


@pytest.mark.parametrize("what", ["video", "tokens", "answer", "missing"])
def test_changed_data_is_refused_by_name(what: str, tmp_path: Path) -> None:
    prompts = [g.prompt for g in GROUPS]
    changed = prompts[2]
    if what == "video":
        media = (replace(changed.media[0], key="sha-other"), changed.media[1])
        prompts[2] = replace(changed, media=media)
    elif what == "tokens":
        prompts[2] = replace(changed, token_ids=changed.token_ids[:-1])
    elif what == "answer":
        prompts[2] = replace(changed, row=replace(changed.row, answer="B"))
    else:
        del prompts[2]
    with pytest.raises(ValueError, match=r"rollout\.replay_from=.* behind 1 prompts .*train\.jsonl:1") as caught:
        RolloutStore(tmp_path, writes=False).check_unchanged(GROUPS, prompts)
    assert "train.jsonl:3" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([], "step_2.jsonl holds no prompts"),
        ([group(0, 0), group(1, 0, num_samples=1)], "step_2.jsonl holds 1 of 2 prompts with a single response"),
    ],
)
def test_groups_that_compare_nothing_are_refused(groups: list[Group], why: str, tmp_path: Path) -> None:
    store = RolloutStore(tmp_path, writes=True)
    store.check_learnable(0, GROUPS[:3])
    with pytest.raises(ValueError, match=rf"rollout\.replay_from=.*{why}"):
        store.check_learnable(2, groups)


@pytest.mark.parametrize("text", ['{"prompt": {"prompt_id": 4, "row"', '{"prompt": 1}', "[]", '{"prompt": {}}', "3"])
def test_a_damaged_line_is_named(text: str, tmp_path: Path) -> None:
    RolloutStore(tmp_path, writes=True).save(0, GROUPS[:2])
    with (tmp_path / "step_0.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(ValueError, match=r"rollout\.replay_from=.*: step_0\.jsonl: line 3 is no saved group \("):
        RolloutStore(tmp_path, writes=False).load(0)
