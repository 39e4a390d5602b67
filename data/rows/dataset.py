# SPDX-License-Identifier: Apache-2.0
"""Data files -> checked rows. A line that cannot be used becomes a `BadRow` that names it; none is lost."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.rows.embedded import write_out
from data.rows.sources import open_source, source_names
from megatron_rl.rewards.grading import reference_answer
from megatron_rl.types import BadRow, Row

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(
    setting: str, media_root: str, embedded: Path, field: str = "data.train"
) -> list[tuple[list[Row], list[BadRow]]]:
    """(usable, bad) rows of each data set that `setting` lists (sources.py), in the order of its files.

    Relative media paths are resolved against `media_root`, or the folder of the data set. Media that a data file holds
    itself are written to the folder `embedded`.
    """
    _check_media_root(media_root)
    found = []
    for name in source_names(setting):
        source = open_source(name, field)
        folders = _Folders(Path(media_root).absolute() if media_root else source.root, embedded.absolute())
        rows: list[Row] = []
        bad: list[BadRow] = []
        for file in source.files:
            good_here, bad_here = _read_file(file, folders, f"{field}={name}")
            rows += good_here
            bad += bad_here
        found.append((rows, bad))
    return found


def _check_media_root(media_root: str) -> None:
    if media_root and not Path(media_root).is_dir():
        raise ValueError(f"data.media_root={media_root}: no such folder; give the folder that holds the videos")


@dataclass(frozen=True, slots=True)
class _Folders:
    """Where relative media paths begin, and where embedded media go."""

    root: Path
    embedded: Path


def _read_file(file: Path, folders: _Folders, setting: str) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, record in _records(file, setting):
        source = f"{file.name}:{number}"
        try:
            rows.append(_row(_decoded(record) if isinstance(record, bytes) else record, source, folders))
        except ValueError as error:
            bad.append(BadRow(source, str(error)))
    return rows, bad


def _records(file: Path, setting: str) -> Iterator[tuple[int, object]]:
    """(number from 1, record) of a file; a line of JSONL comes undecoded."""
    if file.suffix == ".parquet":
        yield from enumerate(_parquet(file, setting), start=1)
    elif file.suffix == ".json":
        try:
            records = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{setting}: {file.name} is not JSON ({error}); is it JSONL?") from error
        if not isinstance(records, list):
            raise ValueError(f"{setting}: {file.name} holds no list of records; use JSONL or a JSON list")
        yield from enumerate(records, start=1)
    else:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        yield from ((n, line) for n, line in enumerate(lines, start=1) if line.strip())


def _parquet(file: Path, setting: str) -> Iterator[object]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{setting}: {file.name} is no readable Parquet file ({error}); copy it again") from error


def _decoded(line: bytes) -> object:
    try:
        record: object = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of the line") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deeply") from error
    return record


def _row(record: object, source: str, folders: _Folders) -> Row:
    """The row of one record, or a ValueError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return Row(
        source=source,
        problem=_text(record, "problem"),
        answer=_answer(record),
        videos=_media(record, "videos", folders) or _media(record, "video", folders),
        problem_type=_whole(str(record.get("problem_type") or ""), "problem_type"),
        images=_media(record, "images", folders) or _media(record, "image", folders),
        span=_span(record),
        audios=_media(record, "audios", folders) or _media(record, "audio", folders),
    )


def _span(record: dict) -> tuple[float, float]:
    """`video_start`, `video_end` in seconds: the part of its videos that a row is about."""
    span = []
    for name, default in (("video_start", 0.0), ("video_end", math.inf)):
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"`{name}` must be a number of seconds, found {type(value).__name__}")
        span.append(default if value is None else float(value))
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"`video_start` {span[0]} and `video_end` {span[1]} are no range of seconds")
    return span[0], span[1]


def _text(record: dict, name: str) -> str:
    """A non-empty text field. Numbers count as text: `"answer": 42` is common in mathematics sets."""
    if name not in record or record[name] is None:
        raise ValueError(f"`{name}` is missing")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"`{name}` must be text, found {type(value).__name__}")
    text = str(value)
    if not text.strip():
        raise ValueError(f"`{name}` is empty")
    return _whole(text, name)


def _whole(text: str, name: str) -> str:
    """`text` itself, unless it holds half a character, as JSON can write it."""
    if _LONE_SURROGATE.search(text):
        raise ValueError(f"`{name}` holds half a surrogate pair, which is no text")
    return text


def _answer(record: dict) -> str:
    """The text of the file, byte for byte: SFT learns all of it. What a reward compares with is taken out of it when a
    response is graded."""
    text = _text(record, "answer")
    if not reference_answer(text):
        raise ValueError("`answer` is empty")
    return text


def _media(record: dict, name: str, folders: _Folders) -> tuple[str, ...]:
    """Absolute paths of a field that holds one medium or a list of them."""
    media = record.get(name)
    if media is None or media == "":
        return ()
    return tuple(_medium(m, name, folders) for m in (media if isinstance(media, list) else [media]))


def _medium(medium: object, name: str, folders: _Folders) -> str:
    """A path, or {"bytes", "path"}, of which one may be missing."""
    path: object = medium
    if isinstance(medium, dict):
        path, content = medium.get("path"), medium.get("bytes")
        if isinstance(content, bytes):
            return str(write_out(content, str(path or ""), folders.embedded))
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError(f'`{name}` must be a path, {{"bytes", "path"}}, or a list of them')
    return str(folders.root / _whole(path, name))
