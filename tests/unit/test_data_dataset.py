# SPDX-License-Identifier: Apache-2.0
"""Reading JSONL: good rows in order, bad ones named by line, nothing lost."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data.rows.dataset import read_rows
from data.rows.records import SUFFIXES
from data.rows.sources import source_problems
from data.video.images import probe_image
from megatron_rl.types import BadRow, Row

NOWHERE = Path("/no/media/in/these/files")


def read(tmp_path, *lines, media_root=""):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    [found] = read_rows(str(path), media_root, tmp_path / "media")
    return found.rows, found.bad


def test_longvideo_reason_record(tmp_path):
    record = {"problem_id": 7, "data_type": "video", "videos": "clips/a b.mp4", "problem": "Where?\nA) x",
              "problem_type": "spatial", "reasoning": "long", "answer": "<answer> B\n</answer>"}  # fmt: skip
    rows, bad = read(tmp_path, record)
    assert bad == []
    video = (str(tmp_path / "clips/a b.mp4"),)
    assert rows == [Row("train.jsonl:1", "Where?\nA) x", "<answer> B\n</answer>", video, "spatial")]


def test_an_answer_is_kept_byte_for_byte(tmp_path):
    answer = "<think>first red, then blue</think>\n<answer> B </answer>\n"
    rows, bad = read(tmp_path, {"problem": "p", "answer": answer})
    assert bad == [] and rows[0].answer == answer


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


def test_images(tmp_path):
    (one, several), _ = read(
        tmp_path,
        {"problem": "p", "answer": "a", "image": "x.png", "video": "v.mp4"},
        {"problem": "p", "answer": "a", "images": ["x.png", "/y.jpg"], "videos": "v.mp4", "audio": "s.wav"},
    )
    assert one.audios == () and several.audios == (str(tmp_path / "s.wav"),)
    assert one.images == (str(tmp_path / "x.png"),) and one.videos == (str(tmp_path / "v.mp4"),)
    assert several.images == (str(tmp_path / "x.png"), "/y.jpg") and several.videos == (str(tmp_path / "v.mp4"),)


def test_files_as_windows_writes_them(tmp_path):
    record = {"problem": "p", "answer": "a"}
    for name, text in (("a.jsonl", json.dumps(record) + "\n"), ("a.json", json.dumps([record]))):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
        [found] = read_rows(str(tmp_path / name), "", tmp_path / "media")
        assert (found.rows, found.bad) == ([Row(f"{name}:1", "p", "a")], [])


def test_relative_roots_become_absolute(tmp_path, monkeypatch):
    read(tmp_path, {"problem": "p", "answer": "a", "videos": "x.mp4"})
    monkeypatch.chdir(tmp_path)
    [found] = read_rows("train.jsonl", "", tmp_path / "media")
    [row] = found.rows
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
        ({"problem": "p", "answer": "a", "images": [{"bytes": "x"}]}, "`images` must be a path"),
        ({"problem": "p", "answer": "a", "audio": 3}, "`audio` must be a path"),
        ({"problem": "p", "answer": "a", "video": ["a\0b"]}, "`video` must be a path"),
        ({"problem": "p\ud800", "answer": "a"}, "half a surrogate pair"),
        ({"problem": "p", "answer": "a", "videos": "a\udc80.mp4"}, "`videos` holds half a surrogate"),
        ({"problem": "p", "answer": "a", "problem_type": "\ud800"}, "`problem_type` holds half a surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        ({"problem": "p", "answer": "a", "videos": [3]}, "`videos` must be"),
        ({"problem": "p", "answer": "a", "videos": {"uri": "x"}}, "`videos` must be"),
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
        read_rows(str(tmp_path / "no.jsonl"), "", tmp_path / "media", field="data.eval")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^data\.media_root=.*/no: no such folder; "):
        read_rows(str(tmp_path / "train.jsonl"), str(tmp_path / "no"), tmp_path / "media")


# ---------------------------------------------------------------------------------- JSON, Parquet, folders, splits, hub

RECORDS = [{"problem": f"p{n}", "answer": n, "videos": [f"{n}.mp4"]} for n in range(4)]


def write_parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow of requirements/cpu.lock is not installed")
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(records), path)


def write_json(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, records))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records))


def problems(setting) -> list[list[str]]:
    return [[row.problem for row in found.rows] for found in read_rows(str(setting), "", NOWHERE) if not found.bad]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    bad_record = {"problem": "no answer", "answer": None, "videos": []}
    (write_parquet if name.endswith("parquet") else write_json)(tmp_path / name, [*RECORDS, bad_record])
    [found] = read_rows(str(tmp_path / name), "", tmp_path / "media")
    rows, bad = found.rows, found.bad
    assert rows == [Row(f"{name}:{n + 1}", f"p{n}", str(n), (str(tmp_path / f"{n}.mp4"),)) for n in range(4)]
    assert bad == [BadRow(f"{name}:5", "`answer` is missing")]


def test_the_shards_of_a_folder_s_split_in_order(tmp_path):
    for number in range(3):
        write_json(tmp_path / f"data/train-{number:05}-of-00003.jsonl", [RECORDS[number]])
    write_json(tmp_path / "data/test-00000-of-00001.json", [RECORDS[3]])
    assert problems(tmp_path) == problems(f"{tmp_path}@train") == [["p0", "p1", "p2"]]
    assert problems(f"{tmp_path}@test") == [["p3"]]
    row = read_rows(str(tmp_path), "", tmp_path / "media")[0].rows[0]
    assert row.videos == (str(tmp_path / "0.mp4"),), "media paths go by the folder that was named"
    with pytest.raises(ValueError, match=r"^data\.train=.*@dev: has the splits data, test, train; choose one with @"):
        read_rows(f"{tmp_path}@dev", "", tmp_path / "media")


def test_a_split_may_be_a_folder_and_a_single_one_needs_no_name(tmp_path):
    write_json(tmp_path / "one/val/0000.jsonl", RECORDS[:2])
    write_json(tmp_path / "two/train/0000.jsonl", RECORDS[:1])
    write_json(tmp_path / "two/val/0000.jsonl", RECORDS[1:])
    assert problems(tmp_path / "one") == [["p0", "p1"]]
    assert problems(tmp_path / "two") == [["p0"]]
    assert problems(f"{tmp_path}/two@val") == [["p1", "p2", "p3"]]


def test_several_data_sets(tmp_path):
    write_json(tmp_path / "a,b@c.jsonl", RECORDS[:1])
    write_json(tmp_path / "d.json", RECORDS[1:])
    assert problems(tmp_path / "a,b@c.jsonl") == [["p0"]], "a path that exists is taken as it is"
    (tmp_path / "a,b@c.jsonl").rename(tmp_path / "a.jsonl")
    assert problems(f"{tmp_path}/a.jsonl, {tmp_path}/d.json") == [["p0"], ["p1", "p2", "p3"]]


def test_a_hub_name_is_downloaded(tmp_path, monkeypatch):
    """No network here: the download is replaced, its arguments are checked."""
    write_json(tmp_path / "train.jsonl", RECORDS[:1])
    write_json(tmp_path / "test.jsonl", RECORDS[1:])
    asked = []

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert problems("some/data@test") == [["p1", "p2", "p3"]]
    assert asked == [("some/data", "dataset", [f"*{suffix}" for suffix in SUFFIXES])]


def test_a_hub_name_that_cannot_be_had_names_the_setting():
    with pytest.raises(ValueError, match=r"^data\.train=no-such/data-set: neither a file here nor"):
        read_rows("no-such/data-set", "", NOWHERE)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '{\n"problem": "p"}', "holds no list of records"),
        ("a.json", '{"problem": "p"}\n[1]', "is it JSONL"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.csv", "problem,answer", "not one of .jsonl"),
        ("a.parquet", "PAR1 nonsense", "no readable Parquet"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, content, reason):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow of requirements/cpu.lock is not installed")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_rows(str(tmp_path / name), "", tmp_path / "media")


def test_media_in_the_file_itself_are_written_out_once(tmp_path):
    """As Hugging Face's Image feature is kept in Parquet: bytes and a name, or either."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 40)).save(buffer, "PNG")
    content = buffer.getvalue()
    records = [
        {
            "problem": "p",
            "answer": "a",
            "images": [{"bytes": content, "path": "a.png"}, {"bytes": None, "path": "b.png"}],
        },
        {"problem": "q", "answer": "a", "images": [{"bytes": content, "path": "c.png"}]},
        {"problem": "r", "answer": "a", "images": [{"bytes": None, "path": None}]},
    ]
    write_parquet(tmp_path / "a.parquet", records)
    for _ in range(2):
        [found] = read_rows(str(tmp_path / "a.parquet"), "", tmp_path / "run" / "media")
        rows, bad = found.rows, found.bad
    written = tmp_path / "run" / "media" / f"{hashlib.sha256(content).hexdigest()}.png"
    assert [row.images for row in rows] == [(str(written), str(tmp_path / "b.png")), (str(written),)]
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    assert written.read_bytes() == content and probe_image(str(written)).width == 8
    assert [b.source for b in bad] == ["a.parquet:3"]


def test_settings_are_checked_without_reading(tmp_path):
    write_json(tmp_path / "a.jsonl", RECORDS)
    assert source_problems(f"{tmp_path}/a.jsonl, owner/name@train", "data.train") == []
    found = source_problems(f"{tmp_path}/a.jsonl@train, {tmp_path}/gone.jsonl, {tmp_path}@dev", "data.eval")
    assert len(found) == 3 and all(problem.startswith(f"data.eval={tmp_path}") for problem in found)


def test_a_range_of_seconds(tmp_path):
    (row, other), bad = read(
        tmp_path,
        {"problem": "p", "answer": "a", "videos": "x.mp4", "video_start": 3, "video_end": 9.5},
        {"problem": "p", "answer": "a", "videos": "x.mp4", "video_end": None},
        {"problem": "p", "answer": "a", "videos": "x.mp4", "video_start": 9, "video_end": 3},
        {"problem": "p", "answer": "a", "videos": "x.mp4", "video_start": "0:10"},
    )
    assert (row.span, other.span) == ((3.0, 9.5), (0.0, float("inf")))
    assert ["no range of seconds" in bad[0].reason, "found str" in bad[1].reason] == [True, True]
