# SPDX-License-Identifier: Apache-2.0
"""Rows in the formats people have: one record of each as its publisher writes it, and other ways to say the same."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import os
import subprocess
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

from data.rows.dataset import DataSet, RowFormat, read_rows
from data.rows.loader import fingerprint
from megatron_rl.types import Row


def read(tmp_path: Path, *records: object, name: str = "a.jsonl", **settings) -> DataSet:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    form = RowFormat(settings.pop("columns", {}), settings.pop("turns", "last"))
    [found] = read_rows(str(path), "", tmp_path / "media", form=form, **settings)
    return found


def row_of(tmp_path: Path, record: object, **settings) -> Row:
    found = read(tmp_path, record, **settings)
    assert not found.bad, found.bad
    return found.rows[0]


def reason(tmp_path: Path, record: object, **settings) -> str:
    found = read(tmp_path, record, **settings)
    assert not found.rows
    return found.bad[0].reason


PLAIN = {"problem": "p", "answer": "a"}

# ------------------------------------------------------------------------------------------------------ published sets


def test_video_r1(tmp_path):
    record = {
        "problem_id": 1, "problem": "Which?", "data_type": "video", "problem_type": "multiple choice",
        "options": ["A. x", "B. y"], "solution": "<answer>B</answer>", "path": "./v/a.mp4", "data_source": "s",
    }  # fmt: skip
    picture = record | {"data_type": "image", "path": "b.png", "options": [], "problem_type": "numerical"}
    found = read(tmp_path, record, picture)
    video = (str(tmp_path / "v/a.mp4"),)
    assert found.rows[0] == Row("a.jsonl:1", "Which?\nA. x\nB. y", "<answer>B</answer>", video, "multiple choice")
    assert found.rows[1].problem == "Which?" and found.rows[1].images == (str(tmp_path / "b.png"),)
    assert not found.bad and found.unused_columns == ("problem_id", "data_source")


def test_llava_video(tmp_path):
    """<image> stands for the video there; several turns, the last answer is learned, or each."""
    turns = [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which?\nA. a cat\nB. a dog"},
        {"from": "gpt", "value": "A"},
    ]
    record = {"id": "x", "conversations": turns, "data_source": "0_30_s", "video": "c/a.mp4"}
    row = row_of(tmp_path, record)
    assert row.history == (("user", "<video>\nWhat is shown?"), ("assistant", "A cat."))
    assert (row.problem, row.answer) == (turns[2]["value"], "A") and row.videos == (str(tmp_path / "c/a.mp4"),)
    first, second = read(tmp_path, record, turns="all").rows
    assert (first.source, first.problem, first.answer) == ("a.jsonl:1#1", "<video>\nWhat is shown?", "A cat.")
    assert first.videos == row.videos and first.history == ()
    assert second == Row("a.jsonl:1#2", row.problem, "A", row.videos, history=row.history)


def test_video_mme_parquet(tmp_path):
    record = {
        "video_id": "001", "duration": "short", "url": "https://www.youtube.com/watch?v=f", "videoID": "fFjv93ACGo8",
        "question_id": "001-1", "question": "When?", "options": ["A. Now.", "B. Later."], "answer": "B",
    }  # fmt: skip
    found = read(tmp_path, record, name="a.parquet")
    assert found.rows[0].problem == "When?\nA. Now.\nB. Later."
    assert found.rows[0].videos == (str(tmp_path / "fFjv93ACGo8.mp4"),)
    assert found.unused_columns == ("video_id", "duration", "url", "question_id")
    pattern = {"videos": "data/{video_id}/{videoID}.webm"}
    assert row_of(tmp_path, record, columns=pattern).videos == (str(tmp_path / "data/001/fFjv93ACGo8.webm"),)


def test_messages(tmp_path):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<video>q"},
        {"role": "assistant", "content": "A"},
    ]
    row = row_of(tmp_path, {"messages": turns, "videos": ["a.mp4"]})
    assert row == Row("a.jsonl:1", "<video>q", "A", (str(tmp_path / "a.mp4"),), system="Be short.")
    as_text = row_of(tmp_path, {"messages": json.dumps(turns), "videos": "['a.mp4']"}, name="a.parquet")
    assert as_text.problem == row.problem and as_text.videos == row.videos


def test_messages_of_parts(tmp_path):
    """As the OpenAI and Qwen clients write them; a word that looks like a mark stays one."""
    content = [
        {"type": "video", "video": "a.mp4", "video_start": 1.0, "video_end": 2},
        {"type": "text", "text": "Does <video> differ from "},
        {"type": "image_url", "image_url": {"url": "file:///b%20c.png"}},
        {"type": "text", "text": "?"},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
    row = row_of(tmp_path, {"messages": turns})
    assert row.problem == r"<video>Does \<video> differ from <image>?" and row.answer == "Yes"
    assert row.images == ("/b c.png",) and row.video_spans == ((1.0, 2.0),)
    assert "`messages` and `videos` both name media" in reason(tmp_path, {"messages": turns, "videos": "c.mp4"})
    place = [{"role": "user", "content": [{"type": "image"}]}, turns[1]]
    assert row_of(tmp_path, {"messages": place, "image": "x.png"}).problem == "<image>"
    assert "has places for media, but the row names none" in reason(tmp_path, {"messages": place})


def test_a_prompt_of_turns_and_an_answer_of_its_own(tmp_path):
    """As verl writes its rows, with the answer in a column that the recipe names."""
    turns = [{"role": "user", "content": "1+1?"}]
    record = {"prompt": turns, "truth": 2.0}
    assert row_of(tmp_path, record, columns={"answer": "truth"}) == Row("a.jsonl:1", "1+1?", "2")
    assert "ends without an answer" in reason(tmp_path, record)
    both = {"messages": [*turns, {"role": "assistant", "content": "It is 2."}], "answer": "2"}
    assert "`messages` ends with an answer and another column holds another one" in reason(tmp_path, both)
    assert row_of(tmp_path, both, columns={"answer": "answer"}).answer == "2"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "tool", "content": "x"}], "turn of 'tool'; the known roles are system"),
        ([{"role": "assistant", "content": "x"}], "no turn of the user"),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "s"}], "put it first"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "x"}], "text of user` is missing"),
        ([{"role": "user", "content": "q"}] + [{"role": "assistant", "content": "x"}] * 2, "does not follow a turn"),
        ([{"role": "user", "content": [{"type": "tool_use"}]}], "part of the type 'tool_use'"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "image"}]}], "only the user's"),
    ],
)
def test_turns_that_cannot_be_used(tmp_path, turns, expected):
    assert expected in reason(tmp_path, {"messages": turns})


@pytest.mark.parametrize("value", [{"role": "user"}, ["x"], [{"role": "user", "content": "q"}, "x"], "no turns"])
def test_a_column_of_turns_that_holds_none(tmp_path, value):
    assert reason(tmp_path, {"messages": value, "answer": "a"}).startswith("`messages` holds no list of turns")


def test_a_system_column_and_keys_of_turns_that_nothing_uses(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "long", "name": None}]
    found = read(tmp_path, {"messages": turns, "system": "s"}, {"messages": turns})
    assert [row.system for row in found.rows] == ["s", ""] and found.unused_columns == ("messages.reasoning",)
    assert "say different things" in reason(
        tmp_path, {"messages": [{"role": "system", "content": "t"}, *turns], "system": "s"}
    )


# ------------------------------------------------------------------------------------------------------------- columns


def test_columns_that_a_recipe_names_and_the_message_without(tmp_path):
    record = {"frage": "q", "antwort": "a", "clip": "x.mp4"}
    names = {"problem": "frage", "answer": "antwort", "videos": "clip"}
    row = row_of(tmp_path, record, columns=names)
    assert (row.problem, row.answer, row.videos) == ("q", "a", (str(tmp_path / "x.mp4"),))
    assert reason(tmp_path, record) == (
        "`problem` is missing; the row has frage, antwort, clip; name its column with data.columns.problem"
    )
    assert "`question` is missing; the row has" in reason(tmp_path, PLAIN, columns={"problem": "question"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nan_is_missing_in_every_field(tmp_path, name):
    nothing = dict.fromkeys(("videos", "images", "options", "system", "problem_type", "video_start", "fps"), math.nan)
    row = row_of(tmp_path, PLAIN | nothing, name=name)
    assert row == Row(f"{name}:1", "p", "a")
    assert reason(tmp_path, {"problem": "p", "answer": math.nan}, name=name) == "`answer` is missing"
    assert "`problem` is missing" in reason(tmp_path, {"problem": math.nan, "answer": "a"}, name=name)


@pytest.mark.parametrize(("value", "text"), [(42.0, "42"), (-3.0, "-3"), (0.5, "0.5"), (1e300, "1e+300"), (7, "7")])
def test_whole_doubles_are_integers(tmp_path, value, text):
    assert row_of(tmp_path, {"problem": value, "answer": value}).answer == text
    assert row_of(tmp_path, {"problem": "p", "answer": value}, name="a.parquet").answer == text


def test_an_infinite_answer_is_none(tmp_path):
    assert "is inf, which is no finite number" in reason(tmp_path, {"problem": "p", "answer": math.inf})


@pytest.mark.parametrize(("one", "two"), [("videos", "video"), ("images", "image"), ("audios", "audio")])
def test_columns_that_contradict_each_other(tmp_path, one, two):
    found = reason(tmp_path, PLAIN | {one: ["a.mp4"], two: "b.mp4"})
    assert found == f"`{one}` and `{two}` say different things; keep one of the columns"
    assert read(tmp_path, PLAIN | {one: ["a.mp4"], two: "a.mp4"}).rows


def test_unused_columns_and_marks_without_media_are_noted(tmp_path):
    records = [PLAIN | {"video_path": "a.mp4", "problem": "<video>q"}, PLAIN, {"answer": "a", "other": 1}]
    found = read(tmp_path, *records)
    assert found.rows[0].problem == "<video>q" and found.unused_columns == ("video_path",)
    columns, marks = found.notes()
    assert (
        "columns that nothing uses: video_path" in columns
        and "rows without media whose text has marks such as <video>, which are words there: 1" in marks
    )


def test_keys_of_media_that_nothing_uses_are_named(tmp_path):
    found = read(
        tmp_path, PLAIN | {"videos": [{"video": "a.mp4", "nframes": 8}], "image": {"path": "a.png", "width": 3}}
    )
    assert found.unused_columns == ("image.width", "videos.nframes") and found.rows


def test_a_column_that_is_named_and_not_there_is_noted(tmp_path):
    names = {"videos": "clpi", "images": "{folder}/{name}.png"}
    found = read(tmp_path, PLAIN | {"clip": "a.mp4", "name": "x", "folder": "y"}, columns=names)
    assert found.absent == ("videos=clpi",) and found.rows[0].images == (str(tmp_path / "y/x.png"),)
    assert found.notes()[1].endswith("a.jsonl: data.columns.videos=clpi: no record has it")


def test_labels_may_be_anything(tmp_path):
    labels = ["a", 3.0, ["b"], True, None]
    found = read(tmp_path, *[PLAIN | {"problem_type": label} for label in labels])
    assert [row.problem_type for row in found.rows] == ["a", "3", "['b']", "True", ""]


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("problem", "options", "expected"),
    [
        ("Q?", ["A. cat", "B. dog"], "Q?\nA. cat\nB. dog"),
        ("Q?", ["(A) cat", "(B) dog"], "Q?\n(A) cat\n(B) dog"),
        ("Q?", ["cat", "dog"], "Q?\nA. cat\nB. dog"),
        ("Q?", ["B. cat", "A. dog"], "Q?\nA. B. cat\nB. A. dog"),
        ("Q?", [3.0, 4.5], "Q?\nA. 3\nB. 4.5"),
        ("Q?", {"A": "cat", "B": "dog", "C": None}, "Q?\nA. cat\nB. dog"),
        ("Q?", "['cat', 'dog']", "Q?\nA. cat\nB. dog"),
        ("Q?\n(A) cat (B) dog", ["cat", "dog"], "Q?\n(A) cat (B) dog"),
        ("Q?\nA. cat\nB. dog", ["A. cat", "B. dog"], "Q?\nA. cat\nB. dog"),
        ("Is a cat a dog?", ["cat", "dog"], "Is a cat a dog?\nA. cat\nB. dog"),
    ],
)
def test_options_stand_in_the_prompt(tmp_path, problem, options, expected):
    assert row_of(tmp_path, {"problem": problem, "options": options, "answer": "B"}).problem == expected


@pytest.mark.parametrize("answer", ["B", "dog", "<think>7</think><answer>B</answer>", "B. dog"])
def test_an_answer_that_is_one_of_the_options(tmp_path, answer):
    assert row_of(tmp_path, {"problem": "Q?", "options": ["cat", "dog"], "answer": answer}).answer == answer


@pytest.mark.parametrize("answer", [1, -1, "1", "F", "<answer>C</answer>"])
def test_an_index_or_a_letter_beyond_the_options_is_no_answer(tmp_path, answer):
    found = reason(tmp_path, {"problem": "Q?", "options": ["cat", "dog"], "answer": answer})
    assert "is none of the 2 options; write the letter" in found


def test_a_number_among_the_options_is_an_answer(tmp_path):
    assert row_of(tmp_path, {"problem": "How many?", "options": [1, 2], "answer": 2}).answer == "2"


# --------------------------------------------------------------------------------------------------------------- media


def png(colour="red", size=(8, 6)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def test_paths_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    videos = ["file:///data/a%20b.mp4", "~/c.mp4", {"path": "d.mp4"}, {"video": "e.mp4"}, "x#1.mp4"]
    expected = ("/data/a b.mp4", *(str(tmp_path / name) for name in ("home/c.mp4", "d.mp4", "e.mp4", "x#1.mp4")))
    assert row_of(tmp_path, PLAIN | {"videos": videos}).videos == expected
    assert row_of(tmp_path, PLAIN | {"videos": json.dumps(["d.mp4"])}, name="a.parquet").videos == expected[2:3]


def test_spans_of_their_own(tmp_path):
    videos = [{"video": "a.mp4", "video_start": 1.0, "video_end": 2.0}, "b.mp4"]
    row = row_of(tmp_path, PLAIN | {"videos": videos, "video_end": 9})
    assert row.video_spans == ((1.0, 2.0), (0.0, 9.0)) and (row.span_of(0), row.span_of(1)) == row.video_spans
    assert fingerprint([row]) != fingerprint([Row(row.source, "p", "a", row.videos, span=row.span)])
    assert "no range of seconds" in reason(tmp_path, PLAIN | {"videos": [videos[0] | {"video_end": 1.0}]})
    assert "only videos may have" in reason(tmp_path, PLAIN | {"images": {"path": "a.png", "video_start": 1}})


def test_pictures_as_text_and_bytes(tmp_path):
    text = base64.b64encode(png()).decode()
    long = base64.b64encode(png(size=(300, 200)) * 3).decode()
    record = PLAIN | {"images": [f"data:image/png;base64,{text}", long, {"image": f"data:;base64,{text}"}]}
    paths = row_of(tmp_path, record).images
    assert [Path(path).read_bytes() for path in paths] == [png(), png(size=(300, 200)) * 3, png()]
    assert paths[0].endswith(".png")
    assert Path(row_of(tmp_path, PLAIN | {"images": {"type": "base64", "data": text}}).images[0]).read_bytes() == png()
    assert Path(row_of(tmp_path, PLAIN | {"images": [png()]}, name="a.parquet").images[0]).read_bytes() == png()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data:image/png;base64," + "iVBOR" * 1001, "holds base64 text of 5005 characters that is damaged"),
        ("data:image/svg+xml,<svg/>", "a data URL that is not base64"),
        ("http://x.org/" + "a" * 5000, "too long for a path"),
        ("https://x.org/a.png", "is an address, https://x.org/a.png; download"),
        ("file://other/a.png", "a file of the machine other"),
        ({"path": "a.png", "image": "b.png"}, "must be a path"),
        ([["a.png", "b.png"]], "must be a path"),
    ],
)
def test_media_that_cannot_be_used(tmp_path, value, expected):
    found = reason(tmp_path, PLAIN | {"images": value})
    assert expected in found and len(found) < 200


# --------------------------------------------------------------------------------------------------------------- files


def test_packed_files_and_lines_under_the_name_of_json(tmp_path):
    lines = "\n".join(json.dumps(PLAIN | {"problem": f"p{n}"}) for n in range(3)).encode()
    (tmp_path / "a.json").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b"[" + lines.replace(b"\n", b",") + b"]"))
    (tmp_path / "d.jsonl").write_bytes(lines)
    subprocess.run(["zstd", "-q", "--rm", str(tmp_path / "d.jsonl")], check=True)
    (tmp_path / "e.json").write_bytes(lines.split(b"\n")[0])
    for name, num_rows in (("a.json", 3), ("b.jsonl.gz", 3), ("c.json.gz", 3), ("d.jsonl.zst", 3), ("e.json", 1)):
        [found] = read_rows(str(tmp_path / name), "", tmp_path)
        assert [row.problem for row in found.rows] == [f"p{n}" for n in range(num_rows)] and not found.bad
    (tmp_path / "s").mkdir()
    os.rename(tmp_path / "b.jsonl.gz", tmp_path / "s/train-00000-of-00001.jsonl.gz")
    assert len(read_rows(f"{tmp_path}/s@train", "", tmp_path)[0].rows) == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_is_refused(tmp_path, name):
    lines = "\n".join(json.dumps(PLAIN | {"problem": f"p{n * 7919}"}) for n in range(999)).encode()
    if name.endswith("gz"):
        packed = gzip.compress(lines)
    else:
        packed = subprocess.run(["zstd", "-q"], input=lines, stdout=subprocess.PIPE, check=True).stdout
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"^data\.train=.*{name} cannot be unpacked .*; copy it again"):
        read_rows(str(tmp_path / name), "", tmp_path)


def test_only_the_first_records(tmp_path):
    found = read(tmp_path, *[PLAIN] * 5, limit=3)
    assert len(found.rows) == 3 and not found.is_whole
    assert read(tmp_path, *[PLAIN] * 3, limit=3).is_whole


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps(PLAIN | {"videos": "v.mp4"}))
    [found] = read_rows("~/a.jsonl", "~/m", tmp_path / "media")
    assert found.rows[0].videos == (str(tmp_path / "m/v.mp4"),)
