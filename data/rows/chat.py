# SPDX-License-Identifier: Apache-2.0
"""A row as the messages of a chat template: who says what, and where the media go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

from data.rows.marks import MARKS, num_marks, split_at_marks
from megatron_rl.errors import BadSample
from megatron_rl.types import MediaKind, Row


class ContentPart(TypedDict):
    """A piece of text, or the place of a medium."""

    type: str
    text: NotRequired[str]


class ChatMessage(TypedDict):
    """One turn, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str | list[ContentPart]


def messages_of(row: Row, problem: str, num_media: Mapping[MediaKind, int]) -> list[ChatMessage]:
    """The turns of a row, the last of them `problem`. Marks such as <video> in the user's turns say where its media go;
    a kind without marks goes before the first of these.

    `num_media`: how many media of each kind the prompt places by itself; kinds that are not in it have no marks.
    Without any media every content is the plain text: templates of text-only models know nothing else, and marks are
    words.
    Raises BadSample where marks and media do not fit.
    """
    turns = [*row.history, ("user", problem)]
    users = [text for role, text in turns if role == "user"]
    ahead = _without_marks(row.source, users, num_media) if any(num_media.values()) else []
    messages: list[ChatMessage] = [{"role": "system", "content": row.system}] if row.system else []
    for role, text in turns:
        if role == "assistant":
            messages.append({"role": "assistant", "content": text})
        elif not any(num_media.values()):
            messages.append({"role": "user", "content": text})
        else:
            content = [*ahead, *_parts(text, list(num_media))]
            messages.append({"role": "user", "content": content})
            ahead = []
    return messages


def places_of(messages: Sequence[ChatMessage]) -> list[MediaKind]:
    """The kinds of the media, in the order of their places."""
    parts = [
        part["type"] for message in messages if isinstance(message["content"], list) for part in message["content"]
    ]
    return [kind for part in parts for kind in MARKS if kind == part]


def _without_marks(source: str, users: Sequence[str], num_media: Mapping[MediaKind, int]) -> list[ContentPart]:
    """The places of the kinds that have no marks."""
    ahead: list[ContentPart] = []
    for kind, count in num_media.items():
        stated = sum(num_marks(text, kind) for text in users)
        if stated and stated != count:
            raise BadSample(
                source,
                f"{stated} {MARKS[kind]} markers in the text for {count} {kind}s; write \\{MARKS[kind]} for the word",
            )
        if not stated:
            ahead += [ContentPart(type=kind)] * count
    return ahead


def _parts(text: str, kinds: Sequence[MediaKind]) -> list[ContentPart]:
    return [
        ContentPart(type="text", text=part) if kind is None else ContentPart(type=kind)
        for kind, part in split_at_marks(text, kinds)
    ]
