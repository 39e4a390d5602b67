# SPDX-License-Identifier: Apache-2.0
"""Reading JSONL: good rows in order, bad ones named by line, nothing lost."""

from __future__ import annotations

import json

import pytest

from data.dataset import read_jsonl
from megatron_rl.types import BadRow, Row


def read(tmp_path, *lines, media_root=""):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return read_jsonl(str(path), media_root)


def test_longvideo_reason_record(tmp_path):
    record = {"problem_id": 7, "data_type": "video", "videos": "clips/a b.mp4", "problem": "Where?\nA) x",
              "problem_type": "spatial", "reasoning": "long", "answer": "<answer> B\n</answer>"}  # fmt: skip
    rows, bad = read(tmp_path, record)
    assert bad == []
    assert rows == [Row("train.jsonl:1", "Where?\nA) x", "B", (str(tmp_path / "clips/a b.mp4"),), "spatial")]


@pytest.mark.parametrize("videos", [None, "", []])
def test_text_only(tmp_path, videos):
    rows, bad = read(tmp_path, {"problem": "1+1?", "answer": 2, "videos": videos})
    assert (rows, bad) == ([Row("train.jsonl:1", "1+1?", "2")], [])


def test_video_paths(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    record = {"problem": "p", "answer": "a", "videos": ["x.mp4", "/elsewhere/y.mp4"]}
    (row,), _ = read(tmp_path, record, media_root=str(media))
    assert row.videos == (str(media / "x.mp4"), "/elsewhere/y.mp4")


def test_relative_roots_become_absolute(tmp_path, monkeypatch):
    read(tmp_path, {"problem": "p", "answer": "a", "videos": "x.mp4"})
    monkeypatch.chdir(tmp_path)
    (row,), _ = read_jsonl("train.jsonl", "")
    assert row.videos == (str(tmp_path / "x.mp4"),)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"problem": "p", ', "malformed JSON"),
        (b'{"problem": "\xff", "answer": "a"}', "not UTF-8"),
        (b"[1, 2]", "found list"),
        ({"answer": "a"}, "`problem` is missing"),
        ({"problem": "p"}, "`answer` is missing"),
        ({"problem": "  ", "answer": "a"}, "`problem` is empty"),
        ({"problem": "p", "answer": "<answer> </answer>"}, "`answer` is empty"),
        ({"problem": "p", "answer": ["a"]}, "`answer` must be text, found list"),
        ({"problem": "p", "answer": True}, "found bool"),
        ({"problem": "p", "answer": "a", "images": ["i.png"]}, "`images`: not supported yet"),
        ({"problem": "p", "answer": "a", "audio": "s.wav"}, "`audio`: not supported yet"),
        ({"problem": "p", "answer": "a", "videos": [3]}, "`videos` must be"),
        ({"problem": "p", "answer": "a", "videos": {"path": "x"}}, "`videos` must be"),
    ],
)
def test_bad_line_is_named_and_the_others_are_kept(tmp_path, line, reason):
    good = {"problem": "p", "answer": "a", "images": []}
    rows, bad = read(tmp_path, good, b"  ", line, good)
    assert [row.source for row in rows] == ["train.jsonl:1", "train.jsonl:4"]
    assert [row.source for row in bad] == ["train.jsonl:3"] and isinstance(bad[0], BadRow)
    assert reason in bad[0].reason


def test_missing_file_and_folder_name_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.eval=.*no\.jsonl: no such file; "):
        read_jsonl(str(tmp_path / "no.jsonl"), "", field="data.eval")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^data\.media_root=.*/no: no such folder; "):
        read_jsonl(str(tmp_path / "train.jsonl"), str(tmp_path / "no"))
