# SPDX-License-Identifier: Apache-2.0
"""Options of multiple choice: every way of naming one, and none that names another."""

from __future__ import annotations

import itertools

import pytest

from megatron_rl.rewards.grading import same_text
from megatron_rl.rewards.registry import load_reward
from megatron_rl.types import Completion, Prompt, Row

NAMED = [
    "{}",
    "({})",
    "[{}]",
    "{})",
    "{}.",
    "{}:",
    "**{}**",
    "*{}*",
    "`{}`",
    "__{}__",
    "${}$",
    '"{}"',
    r"\text{{{}}}",
    r"\boxed{{{}}}",
    r"$\boxed{{\text{{{}}}}}$",
    "Option {}",
    "option {}.",
    "Choice ({})",
    "Answer: {}",
    "**Answer:** {}",
    "**Answer: {}**",
    "The answer is {}",
    "The correct answer is ({}).",
    "The best option is: {}",
    "The answer is option {}.",
    " {}\n",
]
WITH_TEXT = ["{}. {}", "{}) {}", "({}) {}", "({}). {}", "{}: {}", "**{}.** {}", "**{}. {}**", "Answer: {}. {}."]
TEXTS = {"A": "The red car", "B": "The blue car", "C": "7", "D": "It's 5 o'clock"}
REFERENCES = ["{}", "({})", "{}. {}", "{}) {}", "({}) {}", "{}: {}", "{}. {}."]


@pytest.mark.parametrize("reference", REFERENCES)
def test_an_option_is_right_in_every_way_of_naming_it(reference):
    for wanted, chosen in itertools.product(TEXTS, TEXTS):
        for form in NAMED + WITH_TEXT:
            for letter in (chosen, chosen.lower()):
                answer = form.format(letter, TEXTS[chosen])
                right = same_text(answer, reference.format(wanted, TEXTS[wanted]))
                assert right == (wanted == chosen), (answer, reference.format(wanted, TEXTS[wanted]))


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize(
    "form",
    [
        "{} or C",
        "{}, C",
        "{}. C",
        "{}/C",
        "{} C",
        "{}C",
        "{}) C)",
        "({}) (C)",
        "{}. The red car C. 7",
        "{}. The red car. (C) 7",
        "{} bird",
        "{}nd so on",
        "not {}",
        "~~{}~~",
        "Option not {}",
        "The answer is not {}",
        "{}?",
        "{}!",
        "neither {} nor C",
        "C, {}",
        "",
        ".",
        "Answer:",
    ],
)
def test_what_names_no_option_or_several_is_wrong(form, letter):
    for reference in (letter, f"({letter})", f"{letter}. The red car"):
        assert not same_text(form.format(letter), reference), (form.format(letter), reference)


def test_the_text_of_a_whole_option():
    assert same_text("the red car", "A. The red car") and same_text("The red car.", "(A) The red car")
    assert not same_text("A. The blue car", "A. The red car"), "the letter of one, the text of another"
    assert not same_text("The red car", "A"), "nobody knows what A was"
    assert same_text("B. y", "B") and same_text("B. vitamin C.", "B"), "texts of options hold letters too"


@pytest.mark.parametrize("text", ["U.S. Army", "e.g. cars", "A bird", "I am", "a) red"])
def test_other_text_is_no_whole_option(text):
    assert not same_text(text[0], text) and same_text(text.upper(), text)


def test_text_is_compared_however_it_is_encoded():
    assert same_text("cafe\u0301", "caf\u00e9") and same_text("caf\u00e9", "cafe\u0301")
    assert same_text("\uff22", "B") and same_text("\uff08\uff22\uff09", "B"), "full width"
    assert not same_text("x\u00b2", "x2"), "an exponent is no digit"
    assert not same_text("cafe", "caf\u00e9")


def test_options_in_a_reward():
    for answer, text, expected in (
        ("A. The red car", "<answer>A</answer>", 1),
        ("<answer>A. The red car</answer>", "<answer>**A**</answer>", 1),
        ("B", "<answer>Option B</answer>", 1),
        ("B", r"\boxed{\text{B}}", 1),
        ("B", "<answer>A, B, C, D</answer>", 0),
        ("A. The red car", "<answer>A. The red car B. The blue car</answer>", 0),
    ):
        reward = load_reward("math" if "boxed" in text else "r1v", {})
        (part,) = reward([Prompt(0, Row("f:1", "q", answer), ())], [Completion(0, 0, (), (), text, False)])
        assert part["accuracy"] == expected, text
