# SPDX-License-Identifier: Apache-2.0
"""Is an answer the value of the reference? Only an answer that is a value itself is compared: no words, no relation,
no second value, no unit that the reference does not have. The comparison is math-verify's, in a process of its own."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

from megatron_rl.rewards.grading import normalized
from megatron_rl.rewards.value_process import CPU_SECONDS, ValueProcess

LONGEST_VALUE = 300  # characters; a longer span is prose

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))")
_DEGREES = re.compile(r"\^\{\\circ\}|°|\\degree\b")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\W\d_]+|[^\w\s]|_")
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
_ASSIGNED = re.compile(r"[A-Za-z]\s*=(?!=)")
_RELATION = re.compile(r"[=<>≤≥≠≈~]|\\(?:neq?|leq?|geq?|lt|gt|approx|sim|in)(?![A-Za-z])")
_SPACE = re.compile(r"\\[ ,;:!]")
_FRACTION = re.compile(r"\\[dt]?frac\s*\d\s+\d")  # \frac 1 2
# Two numbers, two signs, "not", an operator that lacks a side.
_BROKEN = re.compile(r"\d\s+\.?\d|[+\-−]\s*[+\-−]|^\s*[!*/^]|[+\-−*/^]\s*$")
_ORDER = frozenset(r"< > ≤ ≥ \le \leq \ge \geq \lt \gt".split())
_ARITHMETIC = frozenset(
    r"+ - − * / ^ ! ( ) [ ] { } . × · ÷ π √ \, \; \: \! \frac \dfrac \tfrac \sqrt \cdot \times \div \left \right \pi"
    r" \infty \sin \cos \tan \ln \log \exp \binom \text \textbf \mathrm \mathbf".split()
) | {r"\ "}


class GradingGivenUp(UserWarning):
    """A comparison took longer than it may: the answer counts as wrong."""


def is_value(reference: str) -> bool:
    """Whether a reference answer is a number or formula rather than words (LaTeX commands are no words) or a time or
    ratio ("12:30" is no quotient)."""
    return _WORD.search(reference) is None and ":" not in reference


def same_value(predicted: str, reference: str) -> bool:
    """Equal as mathematics: 1/2 and 0.5, 1,234 and 1234, but not 3 and 3.14, "97 apples" and 97, "18 < 97" and 97.

    math-verify compares, in about 10 ms, and has CPU_SECONDS of processor time; then the answer is wrong, with a
    warning. Pairs that were compared before are answered from memory.
    """
    if max(len(predicted.strip()), len(reference.strip())) > LONGEST_VALUE:
        return False
    answer, wanted = _plain(predicted), _plain(reference)
    if not answer or not wanted or ":" in wanted:
        return False
    return is_comparable(answer, wanted) and _verified(answer, wanted)


def is_comparable(answer: str, reference: str) -> bool:
    """Whether an answer is one value of the reference's kind: beside numbers and arithmetic it may hold only what the
    reference holds too, be it a variable, a unit, a relation or a comma."""
    if _RELATION.search(reference) is None:
        answer = _ASSIGNED.sub("", answer, count=1) if _ASSIGNED.match(answer) else answer
    ours, theirs = _TOKEN.findall(answer), _TOKEN.findall(reference)
    allowed = _ARITHMETIC.union(theirs, _ORDER if _ORDER.intersection(theirs) else ())  # 3 < x is x > 3
    if not allowed.issuperset(ours):
        return False
    words, wanted = (_WORD.findall(text) for text in (answer, reference))
    if words and words != wanted:
        return False
    spaced = _FRACTION.sub(r"\\frac", _SPACE.sub(" ", answer))
    return _BROKEN.search(spaced) is None and _is_balanced(ours)


def close_value_process() -> None:
    """End the process that compares values, if there is one. The next comparison starts another."""
    _PROCESS.close()


def _plain(text: str) -> str:
    """Without the marks of thousands; percent and degrees in one form."""
    text = _DEGREES.sub(r"^\\circ", _GROUPED.sub("", normalized(text)).replace(r"\%", "%"))
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def _is_balanced(tokens: list[str]) -> bool:
    """Whether every bracket has its other one; (1, 2] is an interval."""
    for opening, closing in (("{",), ("}",)), (("(", "["), (")", "]")):
        depth = 0
        for token in tokens:
            depth += (token in opening) - (token in closing)
            if depth < 0:
                return False
        if depth:
            return False
    return True


_PROCESS = ValueProcess()
_TOO_HARD: set[str] = set()  # references that cannot even be compared with themselves


@lru_cache(maxsize=65536)
def _verified(answer: str, reference: str) -> bool:
    """The verdict of math-verify; wrong where it has none in time."""
    if reference in _TOO_HARD:
        return False
    verdict = _PROCESS.compare(answer, reference)
    if verdict is None:
        if _PROCESS.compare(reference, reference) is None:
            _TOO_HARD.add(reference)
            why = "every answer to it that is not the same text is wrong"
        else:
            why = f"the answer {answer!r} is wrong"
        told = f"reference {reference!r}: not compared within {CPU_SECONDS:g} s of processor time; {why}"
        warnings.warn(told, GradingGivenUp, stacklevel=3)
    return bool(verdict)
