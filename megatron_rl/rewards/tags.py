# SPDX-License-Identifier: Apache-2.0
r"""The tags of a response: `<think>`, `<answer>`, `\boxed{}`. Every function reads a text a bounded number of times,
whatever is in it: a response may be a megabyte of unfinished tags."""

from __future__ import annotations

import re

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"

_THINK_THEN_ANSWER = re.compile(rf"{END_THINK}\s*{ANSWER}")
# A box, an escaped brace or backslash (not the second backslash of `\\boxed`), a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\[{}\\](?!boxed)|(?P<open>\{)|(?P<close>\})")


def last_answer_span(text: str, truncated: bool = False) -> str | None:
    """The text of the last complete `<answer>...</answer>`, or None. Of nested ones, the inner. None also where a text
    that was cut off ends within a later span."""
    end = text.rfind(END_ANSWER)
    start = text.rfind(ANSWER, 0, max(end, 0))
    if start < 0 or (truncated and text.rfind(ANSWER) > end):
        return None
    start += len(ANSWER)
    return text[start : text.find(END_ANSWER, start)].strip()


def last_boxed(text: str, truncated: bool = False) -> str | None:
    r"""The content of the last complete `\boxed{...}`, inner braces included, or None. None also where a text that was
    cut off ends within a later box."""
    complete = last_start = None
    opened: list[int | None] = []  # of each brace that is open, where the content starts if it is that of a box
    for match in _BRACES.finditer(text, max(text.find(r"\boxed"), 0)):
        if match.lastgroup == "box":
            last_start = match.end()
            opened.append(last_start)
        elif match.lastgroup == "open":
            opened.append(None)
        elif match.lastgroup == "close" and opened:
            start = opened.pop()
            if start is not None and (complete is None or start > complete[0]):
                complete = start, match.start()
    if complete is None or (truncated and complete[0] != last_start):
        return None
    return text[complete[0] : complete[1]].strip()


def is_think_then_answer(response: str) -> bool:
    """Whether a response is `<think>...</think> <answer>...</answer>` and no more; anything may stand in the spans."""
    text = response.strip()
    if not (text.startswith(THINK) and text.endswith(END_ANSWER)):
        return False
    return _THINK_THEN_ANSWER.search(text, len(THINK), len(text) - len(END_ANSWER)) is not None


def is_think_then_box(response: str) -> bool:
    r"""Whether a response is `<think>...</think>` and, after it, `\boxed{...}` somewhere."""
    text = response.strip()
    thought = text.find(END_THINK, len(THINK))
    if not text.startswith(THINK) or thought < 0:
        return False
    box = text.find(r"\boxed{", thought)
    return box >= 0 and text.find("}", box) >= 0
