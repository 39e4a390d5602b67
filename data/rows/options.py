# SPDX-License-Identifier: Apache-2.0
"""The options of a question, as they stand in the prompt.

The rule, that of the VideoMME benchmark: the problem, a line break, and one option a line, "A. cat". Options that bear
their letters already ("A. cat", "(B) dog") stay as they are. Options that already stand in the problem, each behind its
letter, are not repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from data.rows.columns import as_text, unwritten

_LABEL = re.compile(r"\s*\(?([A-Z])[.):]\s*")
_MOST = 26


def read_options(value: object, name: str) -> list[tuple[str, str]]:
    """(line of the prompt, text without its letter) of each option: of a list, or of {"A": ..., "B": ...}. Raises
    ValueError."""
    value = unwritten(value)
    if isinstance(value, dict):
        return _of_mapping(value, name)
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST:
        raise ValueError(f"`{name}` must be a list of 1 to {_MOST} options")
    texts = [as_text(text, name) for text in value]
    labels = [_LABEL.match(text) for text in texts]
    letters = _letters(len(texts))
    if [label[1] if label else "" for label in labels] == letters:
        return [(text, text[label.end() :].strip()) for text, label in zip(texts, labels, strict=True) if label]
    return [(f"{letter}. {text}", text.strip()) for letter, text in zip(letters, texts, strict=True)]


def with_options(problem: str, options: Sequence[tuple[str, str]]) -> str:
    """The problem and its options, as `read_options` gives them, below it."""
    if all(_stands(letter, text, problem) for letter, (_, text) in zip(_letters(len(options)), options, strict=True)):
        return problem
    return "\n".join([problem, *(line for line, _ in options)])


def check_answer(answer: str, options: Sequence[str], name: str) -> None:
    """Raise ValueError for a number, or a letter, that is none of the options: an index would be learned as text."""
    wanted = answer.strip()
    if wanted in options or not re.fullmatch(r"-?\d+|[A-Z]", wanted) or wanted in _letters(len(options)):
        return
    raise ValueError(f"`{name}` {wanted} is none of the {len(options)} options; write the letter of the option")


def _of_mapping(value: Mapping[object, object], name: str) -> list[tuple[str, str]]:
    found = {str(label): as_text(text, name) for label, text in value.items() if text is not None}
    if list(found) != _letters(len(found)):
        raise ValueError(f"`{name}` must have the keys A, B, C ...; found {', '.join(found)[:60]}")
    return [(f"{label}. {text}", text) for label, text in found.items()]


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + number) for number in range(count)]


def _stands(letter: str, text: str, problem: str) -> bool:
    if text not in problem:  # as most are
        return False
    return re.search(rf"(?<![A-Za-z]){letter}\s*[.):]\s*{re.escape(text)}", problem) is not None
