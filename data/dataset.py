# SPDX-License-Identifier: Apache-2.0
"""JSONL file -> checked rows. A line that cannot be used becomes a `BadRow` that names it; none is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_rl.types import BadRow, Row

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_UNSUPPORTED = ("image", "images", "audio", "audios")


def read_jsonl(path: str, media_root: str, field: str = "data.train") -> tuple[list[Row], list[BadRow]]:
    """Rows of `path` in file order; relative video paths are resolved against `media_root`, or the file's own folder.

    `field` names the setting `path` came from, for the error message. Blank lines are no rows.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{field}={path}: no such file; give a JSONL file with the fields `problem` and `answer`")
    if media_root and not Path(media_root).is_dir():
        raise ValueError(f"data.media_root={media_root}: no such folder; give the folder that holds the videos")
    root = Path(media_root) if media_root else file.parent
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        source = f"{file.name}:{number}"
        try:
            rows.append(_parse(line, source, root.absolute()))
        except ValueError as error:
            bad.append(BadRow(source, str(error)))
    return rows, bad


def _parse(line: bytes, source: str, root: Path) -> Row:
    """The row of one line, or a ValueError that says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    for name in _UNSUPPORTED:
        if record.get(name):
            raise ValueError(f"`{name}`: not supported yet; only text and videos are")
    problem_type = record.get("problem_type") or ""
    return Row(
        source=source,
        problem=_text(record, "problem"),
        answer=_answer(record),
        videos=tuple(str(root / video) for video in _videos(record)),
        problem_type=str(problem_type),
    )


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
    return text


def _answer(record: dict) -> str:
    """LongVideo-Reason stores "<answer>B</answer>": the content is the answer."""
    text = _text(record, "answer")
    tagged = _ANSWER.search(text)
    answer = (tagged.group(1) if tagged else text).strip()
    if not answer:
        raise ValueError("`answer` is empty")
    return answer


def _videos(record: dict) -> list[str]:
    videos = record.get("videos") or []
    videos = [videos] if isinstance(videos, str) else videos
    if not isinstance(videos, list) or not all(isinstance(video, str) and video.strip() for video in videos):
        raise ValueError("`videos` must be a path or a list of paths")
    return videos
