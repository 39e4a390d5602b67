# SPDX-License-Identifier: Apache-2.0
"""Conversations: `messages` (role, content) and `conversations` (from, value), of text or of lists of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from data.rows.columns import as_text, is_missing, unwritten, whole
from data.rows.marks import MARKS, escaped
from megatron_rl.types import MediaKind, Turn

Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_KINDS: Mapping[str, MediaKind] = {
    "video": "video",
    "video_url": "video",
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """`media`: what stands among the parts of contents, by kind, in order; `has_parts`: whether there are places for
    media among them. `unused`: keys of turns that nothing uses."""

    name: str
    system: str
    turns: tuple[Turn, ...]
    media: Mapping[MediaKind, list[object]]
    has_parts: bool
    unused: frozenset[str]


@dataclass(slots=True)
class _Reading:
    """What has been found in a conversation so far."""

    name: str
    has_parts: bool
    media: dict[MediaKind, list[object]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)


def is_conversation(value: object) -> bool:
    """Whether a column holds turns, as a list or as text of one."""
    value = unwritten(value)
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def read_conversation(value: object, name: str) -> Conversation:
    """The turns of a column. Raises ValueError."""
    value = unwritten(value)
    assert isinstance(value, list)
    reading = _Reading(name, has_parts=any(_has_media_parts(turn) for turn in value))
    system = ""
    turns: list[Turn] = []
    for number, turn in enumerate(value):
        role, text = _turn(turn, reading)
        if role != "system":
            turns.append((role, text))
        elif number:
            raise ValueError(f"`{name}` has a system turn behind other turns; put it first")
        else:
            system = text
    unused = frozenset(f"{name}.{key}" for key in reading.unused)
    return Conversation(name, system, tuple(turns), reading.media, reading.has_parts, unused)


def _turn(turn: Mapping[str, object], reading: _Reading) -> tuple[Role, str]:
    speaker = "from" if is_missing(turn.get("role")) else "role"
    content = "value" if is_missing(turn.get("content")) else "content"
    role = _ROLES.get(str(turn.get(speaker)).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise ValueError(f"`{reading.name}` has a turn of {str(turn.get(speaker))[:40]!r}; the known roles are {known}")
    rest = [str(key) for key, item in turn.items() if key not in (speaker, content) and not is_missing(item)]
    reading.unused.update(rest)
    return role, _text(turn.get(content), role, reading)


def _has_media_parts(turn: Mapping[str, object]) -> bool:
    content = turn.get("content")
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and str(part.get("type")) in _KINDS for part in parts)


def _text(content: object, role: str, reading: _Reading) -> str:
    """The text of a turn, marks where its media go; words that look like marks escaped where media are parts."""
    if not isinstance(content, list):
        text = as_text(content, f"{reading.name}: text of {role}")
        return escaped(text) if reading.has_parts and role == "user" else text
    text = "".join(_part(part, role, reading) for part in content)
    if not text.strip():
        raise ValueError(f"`{reading.name}` has an empty turn of {role}")
    return text


def _part(part: object, role: str, reading: _Reading) -> str:
    name = reading.name
    if isinstance(part, str):
        return escaped(part) if reading.has_parts and role == "user" else part
    if not isinstance(part, dict):
        raise ValueError(f"`{name}` has a part of a content that is {type(part).__name__}; use text and media")
    kind = _KINDS.get(str(part.get("type")))
    if kind is None:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"`{name}` has a part of the type {str(part.get('type'))[:40]!r}; use text and media")
        text = whole(part["text"], name)
        return escaped(text) if reading.has_parts and role == "user" else text
    if role != "user":
        raise ValueError(f"`{name}` has a {kind} in a turn of {role}; only the user's may hold media")
    rest = {key: item for key, item in part.items() if key != "type" and not is_missing(item)}
    if rest:  # else a place only: the medium stands in a column
        reading.media.setdefault(kind, []).append(rest)
    return MARKS[kind]
