# SPDX-License-Identifier: Apache-2.0
"""What a response answers, what a row's reference is, and whether they are the same text or the same option.

The rules are told in docs/rewards.md. Values are compared in values.py.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from megatron_rl.rewards.tags import last_answer_span

MissingAnswer = Literal["wrong", "whole_response"]
"""What a response without a complete `<answer>` span answers: nothing, or all of its text."""

_LONGEST_OPTION = 2000  # characters; longer text is no option of a question
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # as Chinese keyboards write ASCII
_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LEAD_IN = re.compile(
    r"(?:the )?(?:(?:correct|right|best|final) )?(?:answer|option|choice)(?: is)?:? ?(?:(?:option|choice) )?",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])(?:[.):,]|$))(.*)")
_WHOLE_OPTION = re.compile(r"(?:\(([A-Z])\)[.:]?|([A-Z])[.):]) (.+)")
_NEXT_OPTION = re.compile(r"(?<![^ (])[A-Z][.):](?: |$)")


def reference_answer(text: str) -> str:
    """What a response is compared with: the last `<answer>` span of a row's `answer`, or all of it where there is none
    (LongVideo-Reason stores `<answer>B</answer>`; a row of SFT data holds the reasoning too)."""
    span = last_answer_span(text)
    return (text if span is None else span).strip()


def same_text(predicted: str, reference: str) -> bool:
    """Equal up to case, spacing, a final full stop, and how an accent or a full-width character is encoded.

    A reference that is an option, "B" or "(B)" or "B. The red car", also takes each way of naming it: "(B)", "**B**",
    "Option B", "Answer: B"; "B. ..." with the text of the option where the reference tells it; that text itself.
    """
    left, right = normalized(predicted), normalized(reference)
    if left and left.casefold() == right.casefold():
        return True
    wanted = _reference_option(right)
    return wanted is not None and len(left) <= _LONGEST_OPTION and _names_option(left, *wanted)


def normalized(text: str) -> str:
    """Without outer blanks, outer "$" and a final full stop; spaces, accents and full-width characters in one form."""
    text = unicodedata.normalize("NFC", text).translate(_FULL_WIDTH)
    return " ".join(text.split()).strip("$ ").removesuffix(".").rstrip()


def _reference_option(reference: str) -> tuple[str, str] | None:
    """(letter, text) of a reference that is an option; the text is empty where it is the letter alone."""
    if letter := re.fullmatch(r"\(?([A-Za-z])\)?", reference):
        return letter.group(1).casefold(), ""
    whole = _WHOLE_OPTION.fullmatch(reference)
    return None if whole is None else ((whole.group(1) or whole.group(2)).casefold(), _folded(whole.group(3)))


def _names_option(answer: str, letter: str, text: str) -> bool:
    """Whether an answer is the option with that letter, and no other beside it."""
    for _ in range(3):  # \boxed{\text{B}}
        answer = _WRAPPED.sub(r"\1", answer)
    answer = re.sub(r"[*`]|^_+|_+$", "", answer).strip(" $\"'")
    lead_in = _LEAD_IN.match(answer)
    answer = answer[lead_in.end() :] if lead_in else answer
    found = _OPTION.fullmatch(answer.rstrip(" .") if len(answer) > 2 else answer)
    if found is None:
        return text != "" and _folded(answer) == text
    chosen, rest = found.group(1) or found.group(2), found.group(3)
    if chosen.casefold() != letter:
        return False
    if rest.strip() and text:
        return _folded(rest) == text
    return not _is_list(chosen, rest) and _NEXT_OPTION.search(rest) is None


def _is_list(chosen: str, rest: str) -> bool:
    """Whether nothing but other letters follow: "B, C", "B. or C"."""
    words = [word for word in re.findall(r"[^\W_]+", rest) if word.casefold() not in ("and", "or")]
    alike = all(len(word) == 1 and word.isalpha() and word.isupper() == chosen.isupper() for word in words)
    return alike and any(word != chosen for word in words)


def _folded(text: str) -> str:
    return normalized(text).casefold()
