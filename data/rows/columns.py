# SPDX-License-Identifier: Apache-2.0
"""The columns of a data set: which one holds the problem, which the answer, and what their values may be.

A column is found by its usual names (NAMES), or by the one that a recipe gives (`data.columns`). What a record does not
say may be absent, null, NaN (as pandas writes it), empty text or an empty list.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal

NAMES: Mapping[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution"),
    "messages": ("messages", "conversations", "prompt"),
    "options": ("options",),
    "system": ("system",),
    "problem_type": ("problem_type",),
    "videos": ("videos", "video"),
    "images": ("images", "image"),
    "audios": ("audios", "audio"),
    "video_start": ("video_start",),
    "video_end": ("video_end",),
    "fps": ("fps",),
}
"""What a field may be called; the first name with a value counts. Of the last three kinds of media two names with
different values contradict each other."""

_MOST_EXACT = 2**53  # whole doubles up to here are the number that was meant
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_IN_BRACES = re.compile(r"\{([^{}]+)\}")


class Record:
    """One record by what its columns mean. `used` holds the columns that were asked for."""

    def __init__(self, values: Mapping[str, object], named: Mapping[str, str]):
        self._values, self._named = values, named
        self.used: set[str] = set()

    @property
    def columns(self) -> list[str]:
        return list(self._values)

    def is_named(self, field: str) -> bool:
        """Whether the recipe names the column of this field."""
        return bool(self._named.get(field))

    def peek(self, column: str) -> object:
        """As `take`, without using the column."""
        value = self._values.get(column)
        return None if is_missing(value) else value

    def take(self, column: str) -> object:
        """The value of a column, None where there is none."""
        if column in self._values:
            self.used.add(column)
        return self.peek(column)

    def columns_of(self, field: str) -> tuple[str, ...]:
        """The columns of the record that may hold a field."""
        names = (self._named[field],) if self.is_named(field) else NAMES[field]
        return tuple(name for name in names if name in self._values)

    def find(self, field: str) -> tuple[str, object]:
        """(column, value) of the first column of a field that has one; ("", None) where none has."""
        for column in self.columns_of(field):
            if (value := self.take(column)) is not None:
                return column, value
        return "", None

    def find_only(self, field: str) -> tuple[str, object]:
        """As `find`. A recipe may put the value together of columns: "clips/{id}.mp4". Raises ValueError for two
        columns that say different things."""
        if "{" in self._named.get(field, ""):
            return self._named[field], self._filled(self._named[field])
        found = [(column, self.take(column)) for column in self.columns_of(field)]
        found = [(column, value) for column, value in found if value is not None]
        if len(found) > 1 and as_list(found[0][1]) != as_list(found[1][1]):
            (first, _), (second, _) = found[:2]
            raise ValueError(f"`{first}` and `{second}` say different things; keep one of the columns")
        return found[0] if found else ("", None)

    def _filled(self, pattern: str) -> str | None:
        """`pattern` with columns in place of their names in braces; None where all of them are missing."""
        values = {name: self.take(name) for name in columns_in(pattern)}
        if all(value is None for value in values.values()):
            return None
        texts = {name: as_text(value, name) for name, value in values.items()}
        return _IN_BRACES.sub(lambda found: texts[found[1]], pattern)

    def missing(self, field: str) -> ValueError:
        """The error for a field that has no value."""
        columns = self.columns_of(field)
        if columns:
            return ValueError(f"`{columns[0]}` is missing")
        shown = ", ".join(name[:40] for name in self.columns[:20]) or "no column"
        name = self._named.get(field) or field
        return ValueError(f"`{name}` is missing; the row has {shown}; name its column with data.columns.{field}")


def columns_in(name: str) -> list[str]:
    """The columns that a recipe names: one, or those in braces."""
    return _IN_BRACES.findall(name) or [name]


def is_missing(value: object) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or value == "" or value == []


def as_text(value: object, name: str) -> str:
    """A non-empty text. Numbers count as text, `42` is common in mathematics sets; a whole double is written without
    ".0", since pandas makes doubles of integers. Raises ValueError."""
    if is_missing(value) and value != "":
        raise ValueError(f"`{name}` is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"`{name}` must be text, found {type(value).__name__}")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, which is no finite number")
        number = int(value)
        text = str(number if value == number and abs(number) <= _MOST_EXACT else value)
    else:
        text = str(value)
    if not text.strip():
        raise ValueError(f"`{name}` is empty")
    return whole(text, name)


def whole(text: str, name: str) -> str:
    """`text` itself, unless it holds half a character, as JSON can write it. Raises ValueError."""
    if _LONE_SURROGATE.search(text):
        raise ValueError(f"`{name}` holds half a surrogate pair, which is no text")
    return text


def as_number(value: object, name: str, unit: str) -> float:
    """A number; `unit` says of what. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"`{name}` must be a number of {unit}, found {type(value).__name__}")
    return float(value)


def as_list(value: object) -> list[object]:
    """A list, the items of a list written as text (as CSV tools write JSON or Python lists), or the value alone."""
    value = unwritten(value)
    return value if isinstance(value, list) else [value]


def unwritten(value: object) -> object:
    """A list or mapping that stands in a column as JSON or Python text; any other value as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return value
