# SPDX-License-Identifier: Apache-2.0
"""What a row says of its media -> paths of files, absolute, and the seconds that are meant.

A medium is a path (relative, absolute, `~`, `file://`), base64 text, bytes, or a mapping of one of these with seconds
of its own. A video may also be a list of pictures, or a folder of them.
"""

from __future__ import annotations

import base64
import math
import mimetypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from data.rows.columns import as_list, as_number, as_text, is_missing, whole
from data.rows.embedded import write_out
from data.video.frame_files import DEFAULT_FPS, FrameFiles, frames_in, write_frame_list
from megatron_rl.types import MediaKind

Span = tuple[float, float]

Rate = Callable[[], float | None]
Where = tuple[object, Span | None, float | None]  # where a medium is, its own seconds, the rate of its pictures

ALWAYS: Span = (0.0, math.inf)
LONGEST_PATH = 4096
_SHORTEST_BASE64 = 512  # shorter text is a path, unless it begins as a picture does
_PICTURES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?[^,]{0,100}?;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_VIDEO_FILES = frozenset(".mp4 .mkv .webm .avi .mov .m4v .ts .mpg .mpeg .flv .wmv .ogv .3gp .h264 .hevc".split())
_WHERE = ("path", "url", "video", "image", "audio", "image_url", "video_url", "audio_url", "input_audio", "data")
_SPAN = ("video_start", "video_end")
_RATE = ("fps", "sample_fps")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where relative media paths begin, and where media go that are no files yet."""

    root: Path
    embedded: Path


@dataclass(frozen=True, slots=True)
class Medium:
    """A file and, where the row states them for this one, the seconds that are meant."""

    path: str
    span: Span | None = None


def read_media(
    value: object, name: str, kind: MediaKind, folders: Folders, fps: Rate, unused: set[str]
) -> list[Medium]:
    """The media of a column: one, or a list. `fps` gives the rate of a video that is a list of pictures; what nothing
    uses in mappings is added to `unused` as "column.key". Raises ValueError."""
    return [] if is_missing(value) else [_medium(item, name, kind, folders, fps, unused) for item in as_list(value)]


def read_span(values: Sequence[object], name: str) -> Span:
    """(start, end) seconds of two values of which either may be missing. Raises ValueError."""
    start, end = (
        default if is_missing(value) else as_number(value, side, "seconds")
        for value, side, default in zip(values, _SPAN, ALWAYS, strict=True)
    )
    if not 0 <= start < end:
        raise ValueError(f"`{_SPAN[0]}` {start} and `{_SPAN[1]}` {end} of {name} are no range of seconds")
    return start, end


def read_fps(value: object, name: str) -> float | None:
    if is_missing(value):
        return None
    fps = as_number(value, name, "frames a second")
    if not 0 < fps < math.inf:
        raise ValueError(f"`{name}` is {fps}; a rate is above 0")
    return fps


def _medium(value: object, name: str, kind: MediaKind, folders: Folders, fps: Rate, unused: set[str]) -> Medium:
    span, own_fps = None, None
    if isinstance(value, dict):
        value, span, own_fps = _parts(value, name, kind, unused)
    if isinstance(value, list):
        if kind != "video" or not value:
            raise _no_medium(name)
        frames = [_file(frame, name, folders) for frame in value]
        return Medium(_frame_list(frames, name, folders, own_fps or fps()), span)
    path = _file(value, name, folders)
    if kind == "video" and PurePath(path).suffix.lower() not in _VIDEO_FILES and os.path.isdir(path):
        return Medium(_frame_list(frames_in(path), f"{name}` folder `{path}", folders, own_fps or fps()), span)
    if own_fps:
        raise ValueError(f"`{name}` has a rate of its own, which only a list of frames may have; see data.fps")
    return Medium(path, span)


def _parts(value: Mapping[str, object], name: str, kind: MediaKind, unused: set[str]) -> Where:
    stated = {key: item for key, item in value.items() if not is_missing(item)}
    unused.update(f"{name}.{key}" for key in stated if key not in (*_WHERE, *_SPAN, *_RATE, "bytes", "type", "format"))
    span = read_span([stated.get(key) for key in _SPAN], f"`{name}`") if any(key in stated for key in _SPAN) else None
    if span and kind != "video":
        raise ValueError(f"`{name}` has {' and '.join(_SPAN)} of its own, which only videos may have")
    if isinstance(stated.get("bytes"), bytes):
        return {"bytes": stated["bytes"], "path": stated.get("path")}, span, None
    found = [stated[key] for key in _WHERE if key in stated]
    if len(found) != 1:
        raise _no_medium(name)
    where, inner_span, fps = (
        _parts(found[0], name, kind, unused) if isinstance(found[0], dict) else (found[0], None, None)
    )
    rates = [read_fps(stated[key], key) for key in _RATE if key in stated]
    if rates and kind != "video":
        raise ValueError(f"`{name}` has a rate of its own, which only a list of frames may have")
    return where, span or inner_span, rates[0] if rates else fps


def _no_medium(name: str) -> ValueError:
    return ValueError(f'`{name}` must be a path, {{"bytes", "path"}}, or a list of them')


def _frame_list(paths: Sequence[str], name: str, folders: Folders, fps: float | None) -> str:
    if not paths:
        raise ValueError(f"`{name}` holds no pictures")
    return write_frame_list(FrameFiles(tuple(paths), DEFAULT_FPS if fps is None else fps), folders.embedded)


# --------------------------------------------------------------------------------------------------------- one file


def _file(value: object, name: str, folders: Folders) -> str:
    """The path of one file; what is no file yet is written out."""
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, bytes):
            return str(write_out(content, path if isinstance(path, str) else "", folders.embedded))
        value = path
    if isinstance(value, bytes):
        return str(write_out(value, "", folders.embedded))
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _no_medium(name)
    text = whole(value, name)
    if (header := _DATA_URL.match(text)) or _is_base64(text):
        suffix = mimetypes.guess_extension(header[1]) if header and header[1] else None
        content = _from_base64(text[header.end() :] if header else text, name)
        return str(write_out(content, f"medium{suffix or ''}", folders.embedded))
    return _path(text, name, folders)


def _is_base64(text: str) -> bool:
    return (len(text) >= _SHORTEST_BASE64 or text.startswith(_PICTURES)) and _BASE64.fullmatch(text) is not None


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"`{name}` holds base64 text of {len(text)} characters that is damaged ({error})") from error


def _path(text: str, name: str, folders: Folders) -> str:
    if text.lower().startswith("data:"):
        raise ValueError(f"`{name}` holds a data URL that is not base64; write the medium to a file")
    if len(text) > LONGEST_PATH:
        raise ValueError(f"`{name}` holds a text of {len(text)} characters, too long for a path")
    if re.match(r"(https?|s3|gs|ftp|hdfs)://", text, re.IGNORECASE):
        raise ValueError(f"`{name}` is an address, {text[:100]}; download the file and give its path")
    if text.lower().startswith("file://"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"`{name}` is a file of the machine {url.netloc[:60]}; give a path of this one")
        text = unquote(text.split("://", 1)[1].removeprefix(url.netloc))  # with what urlsplit takes for a query
    return str(folders.root / os.path.expanduser(text))


def data_type_of(value: object, name: str) -> MediaKind:
    """The kind of medium that a column `data_type` names. Raises ValueError."""
    kinds: dict[str, MediaKind] = {"video": "video", "image": "image", "audio": "audio"}
    text = as_text(value, name).strip().lower()
    if text not in kinds:
        raise ValueError(f"`{name}` is {text[:40]}; known are {', '.join(kinds)}")
    return kinds[text]
