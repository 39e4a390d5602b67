# SPDX-License-Identifier: Apache-2.0
"""Is a predicted answer the reference answer? As text, as a multiple-choice letter, or as a mathematical value."""

from __future__ import annotations

import re
import threading

_LONGEST_VALUE = 300  # characters; a longer span is prose, and prose can keep a symbolic parser busy for minutes
_TIMEOUT_SECONDS = 2


def last_answer_span(response: str) -> str | None:
    """The text of the last complete `<answer>...</answer>`, or None."""
    spans = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return spans[-1].strip() if spans else None


def reference_answer(text: str) -> str:
    """What a response is compared with: the last `<answer>` span of a row's `answer`, or all of it where there is none
    (LongVideo-Reason stores `<answer>B</answer>`; a row of SFT data holds the reasoning too)."""
    span = last_answer_span(text)
    return (text if span is None else span).strip()


def last_boxed(response: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, inner braces included, or None."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", response)]):
        depth = 1
        for position in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[position], 0)
            if depth == 0:
                return response[start:position].strip()
    return None


def same_text(predicted: str, reference: str) -> bool:
    """Equal up to case, spacing and a final full stop; a reference "B" also takes "(B)", "B." and "B. The red car"."""
    left, right = _normalized(predicted), _normalized(reference)
    if re.fullmatch(r"\(?[a-z]\)?", right):
        choice = re.match(r"\(?([a-z])\)?(?:[.):,]|$)", left)
        return choice is not None and choice.group(1) == right.strip("()")
    return left == right and left != ""


def same_value(predicted: str, reference: str) -> bool:
    """Equal as mathematics (math-verify): 1/2 and 0.5, 1,234 and 1234, but not 3 and 3.14."""
    from math_verify import parse, verify  # sympy takes half a second to import

    predicted = _normalized(predicted, fold_case=False)
    if not predicted or len(predicted) > _LONGEST_VALUE:
        return False
    # math-verify stops a runaway expression with SIGALRM, which Python allows in the main thread only.
    limit = _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, target = (parse(rf"\boxed{{{text}}}", parsing_timeout=limit) for text in (reference, predicted))
    return bool(verify(gold, target, timeout_seconds=limit))


def is_value(reference: str) -> bool:
    """Whether a reference answer is a number or formula rather than words (LaTeX commands are no words)."""
    return re.search(r"(?<!\\)\b[^\W\d_]{2,}", reference) is None


def _normalized(text: str, fold_case: bool = True) -> str:
    text = " ".join(text.split()).strip("$ ").removesuffix(".").rstrip()
    return text.casefold() if fold_case else text
