# SPDX-License-Identifier: Apache-2.0
"""Tags of responses: against regular expressions that try everything, and on megabytes of unfinished tags."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from megatron_rl.rewards import tags
from megatron_rl.rewards.registry import load_reward
from megatron_rl.types import Completion, Prompt, Row

PARTS = ("<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "{", "}", " ", "x")


def mixtures(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(PARTS, k=generator.randrange(10))) for _ in range(count)]


def test_forms_are_those_of_the_regular_expressions():
    """What the patterns find by trying every split."""
    r1v = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    boxed = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
    texts = mixtures(0, 5000) + [
        f"<think>{a}</think>{b}<answer>{c}</answer>{d}" for a, b, c, d in itertools.product(PARTS, repeat=4)
    ]
    texts += [f"<think>{a}</think>{b}\\boxed{{{c}}}{d}" for a, b, c, d in itertools.product(PARTS, repeat=4)]
    forms = [(tags.is_think_then_answer(text), tags.is_think_then_box(text)) for text in texts]
    expected = [(r1v.fullmatch(t.strip()) is not None, boxed.fullmatch(t.strip()) is not None) for t in texts]
    assert forms == expected
    assert all(0 < sum(column) < len(texts) for column in zip(*expected, strict=True))


def test_the_span_is_the_last_and_innermost():
    """Against all pairs of tags: the last opening one that has a closing one, up to the first of those."""
    found = 0
    for text in mixtures(1, 5000):
        starts = [m.end() for m in re.finditer("<answer>", text) if "</answer>" in text[m.end() :]]
        expected = text[starts[-1] :].partition("</answer>")[0].strip() if starts else None
        assert tags.last_answer_span(text) == expected, text
        is_open = "<answer>" in text and "</answer>" not in text.rpartition("<answer>")[2]
        assert tags.last_answer_span(text, truncated=True) == (None if is_open else expected), text
        found += expected is not None
    assert found > 200


def test_the_box_is_the_last_complete_one():
    """Against counting braces from every box to the end."""
    found = 0
    for text in mixtures(2, 5000):
        expected = None
        for match in re.finditer(r"\\boxed\{", text):
            depth = list(itertools.accumulate(({"{": 1, "}": -1}.get(c, 0) for c in text[match.end() :]), initial=1))
            if 0 in depth:
                expected = text[match.end() :][: depth.index(0) - 1].strip()
        assert tags.last_boxed(text) == expected, text
        last = text.rpartition(r"\boxed{")[2]
        is_open = r"\boxed{" in text and 0 not in itertools.accumulate(
            ({"{": 1, "}": -1}.get(c, 0) for c in last), initial=1
        )
        assert tags.last_boxed(text, truncated=True) == (None if is_open else expected), text
        found += expected is not None
    assert found > 200


def test_escaped_braces_are_no_braces():
    assert tags.last_boxed(r"\boxed{\left\{1, 2\right.}") == r"\left\{1, 2\right."
    assert tags.last_boxed(r"a \\boxed{7}") == "7", "written with two backslashes"
    assert tags.last_boxed("\\boxed \n {7}") == "7"


@pytest.mark.parametrize(
    "unit",
    [
        ("<think>", "</think><answer>"),
        ("<answer>",),
        ("</answer>",),
        ("<think>",),
        ("</think>",),
        ("<answer>", "</answer>"),
        ("</answer><answer>",),
        ("<think>", "</think> "),
        ("<think></think>", " "),
        ("\\boxed{",),
        ("\\boxed{}",),
        ("<think></think>", "\\boxed{"),
        ("\\",),
        ("{",),
        ("}",),
        ("\\boxed{", "}"),
        ("\\text{",),
        ("<think>", "</think><answer></answer>\\boxed{ "),
        ("<answer>", "A "),
        ("<answer>", "*_`"),
        ("<answer>", "1,"),
    ],
)
def test_a_megabyte_is_graded_in_less_than_a_second(unit):
    """The first part once, the last over and over, closed and not. Quadratic code takes hours: processor time tells."""
    body = unit[0] + unit[-1] * (2**20 // len(unit[-1]))
    for name, text, answer in (("r1v", body + "</answer>", "B"), ("math", body + "}", "7"), ("r1v", body, "7")):
        reward, completion = load_reward(name, {}), Completion(0, 0, (), (), text, True)
        start = time.process_time()
        reward([Prompt(0, Row("f:1", "q", answer), ())], [completion])
        assert time.process_time() - start < 1


def test_how_often_a_text_is_read():
    """Characters that the searches pass over, whatever the mixture: at most a few times the length of the text."""

    class CountedText(str):
        passed = 0

        def find(self, part, start=0, stop=None):
            stop = len(self) if stop is None else stop
            place = super().find(part, start, stop)
            CountedText.passed += (stop if place < 0 else place + len(part)) - start
            return place

        def rfind(self, part, start=0, stop=None):
            stop = len(self) if stop is None else stop
            place = super().rfind(part, start, stop)
            CountedText.passed += stop - (start if place < 0 else place)
            return place

        def strip(self):
            return CountedText(super().strip())

    for unit in itertools.product(PARTS, repeat=3):
        text = CountedText("<think>" + "".join(unit) * 100)
        CountedText.passed = 0
        tags.last_answer_span(text, truncated=True)
        tags.is_think_then_box(text)
        assert 0 < CountedText.passed <= 8 * len(text)
