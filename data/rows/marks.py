# SPDX-License-Identifier: Apache-2.0
"""Marks such as `<video>` in a text: they say where media go. `\\<video>` is the word itself."""

from __future__ import annotations

import re
from collections.abc import Collection

from megatron_rl.types import MediaKind

MARKS: dict[MediaKind, str] = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


def split_at_marks(text: str, kinds: Collection[MediaKind]) -> list[tuple[MediaKind | None, str]]:
    """`text` in parts: (kind, mark) for a mark of one of `kinds`, else (None, text) without the escapes of such
    marks."""
    parts: list[tuple[MediaKind | None, str]] = []
    plain, at = "", 0
    kind_of = {MARKS[kind]: kind for kind in kinds}
    for found in re.finditer(rf"\\?({'|'.join(map(re.escape, kind_of))})" if kind_of else r"(?!)", text):
        plain += text[at : found.start()]
        at = found.end()
        if found[0].startswith("\\"):
            plain += found[1]
            continue
        if plain:
            parts.append((None, plain))
        parts.append((kind_of[found[1]], found[1]))
        plain = ""
    rest = plain + text[at:]
    return [*parts, (None, rest)] if rest else parts


def num_marks(text: str, kind: MediaKind) -> int:
    if MARKS[kind] not in text:  # as most are
        return 0
    return sum(found is not None for found, _ in split_at_marks(text, (kind,)))


def with_marks_of(text: str, kind: MediaKind, other: MediaKind) -> str:
    """The same text with each mark of `kind` turned into one of `other`; escapes stay."""
    return re.sub(rf"(\\?){re.escape(MARKS[kind])}", lambda m: m[0] if m[1] else MARKS[other], text)


def escaped(text: str) -> str:
    """A text whose marks are all words."""
    return re.sub("|".join(map(re.escape, MARKS.values())), lambda m: f"\\{m[0]}", text)


def unescaped(text: str) -> str:
    """The text as it is read where it has no marks, only words that were escaped."""
    return "".join(part for _, part in split_at_marks(text, tuple(MARKS)))
