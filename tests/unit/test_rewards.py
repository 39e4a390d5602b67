# SPDX-License-Identifier: Apache-2.0
"""Rewards against answers graded by hand."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_rl.rewards.grading import is_value, last_answer_span, last_boxed, same_text, same_value
from megatron_rl.rewards.registry import REWARDS, load_reward
from megatron_rl.types import Completion, Prompt, Row


def score(name: str, answer: str, response: str, format_weight: float = 0.1) -> dict[str, float]:
    prompt = Prompt(0, Row("f:1", "q", answer), (), ())
    completion = Completion(0, 0, (), (), response, False)
    return load_reward(name, format_weight)([prompt], [completion])[0]


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        ("B", "B", True),
        ("b", "B", True),
        ("(B)", "B", True),
        ("B.", "B", True),
        ("B. The red car", "B", True),
        ("B) the red car", "(B)", True),
        ("Because", "B", False),
        ("A bird", "A", False),
        ("C", "B", False),
        ("The  red\ncar.", "the red car", True),
        ("red car", "the red car", False),
        ("", "", False),
    ],
)
def test_same_text(predicted, reference, expected):
    assert same_text(predicted, reference) is expected


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        ("3.14", "3.14", True),
        ("3", "3.14", False),
        ("3.", "3", True),
        ("0.5", r"\frac{1}{2}", True),
        ("1,234", "1234", True),
        ("1+x^2", "x^2+1", True),
        ("$7$", "7", True),
        ("12 apples", "12", True),
        ("11, 12, 13", "12", False),
        ("", "12", False),
        ("12 " + "and so on " * 100, "12", False),
    ],
)
def test_same_value(predicted, reference, expected):
    assert same_value(predicted, reference) is expected


def test_values_are_told_from_words():
    assert [is_value(text) for text in ("12", "-3.5", r"\frac{1}{2}", "x^2+1", "12:30")] == [True] * 5
    assert [is_value(text) for text in ("left", "3 men", "été")] == [False] * 3


def test_a_runaway_expression_is_wrong_within_seconds():
    start = time.monotonic()
    assert same_value("10^{10^{10}}", "1") is False
    assert time.monotonic() - start < 10


def test_grading_works_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(same_value("1/2", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]


def test_spans_and_boxes_are_the_last_complete_ones():
    assert last_answer_span("<answer>1</answer> no, <answer>\n2 </answer> <answer>3") == "2"
    assert last_answer_span("2") is None
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed("12") is None


@pytest.mark.parametrize(
    ("answer", "response", "accuracy", "form"),
    [
        ("B", "<think>the sky</think>\n<answer>B</answer>", 1, 1),
        ("B", "<think>line\nline</think><answer>C</answer>", 0, 1),
        ("B", "<answer>B</answer>", 1, 0),
        ("B", "B", 1, 0),
        ("3.14", "<think>a</think><answer>3.14</answer>", 1, 1),
        ("3.14", "<think>a</think><answer>3</answer>", 0, 1),
        ("3", "<think>a</think><answer>3.14</answer>", 0, 1),
        ("left", "<think>a</think><answer>felt</answer>", 0, 1),
        ("two cars", "<think>a</think> <answer> Two cars. </answer>", 1, 1),
        ("B", "<think>a</think><answer>B</answer> and more", 1, 0),
        ("B", "", 0, 0),
    ],
)
def test_r1v(answer, response, accuracy, form):
    parts = score("r1v", answer, response)
    assert (parts["accuracy"], parts["format"]) == (accuracy, form)
    assert parts["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)


def test_format_weight_is_the_share_of_the_format():
    assert score("r1v", "B", "B", format_weight=0.5)["overall"] == 0.5
    assert score("math", "2", r"<think>x</think> \boxed{3}", format_weight=0.25)["overall"] == 0.25


@pytest.mark.parametrize(
    ("answer", "response", "accuracy", "form"),
    [
        ("0.5", r"<think>so</think> It is \boxed{\frac{1}{2}}.", 1, 1),
        ("0.5", r"\boxed{0.5}", 1, 0),
        ("0.5", r"<think>\boxed{0.5}</think> or rather \boxed{0.6}", 0, 1),
        ("0.5", "<think>so</think> 0.5", 0, 0),
        (r"\text{Monday}", r"\boxed{\text{Monday}}", 1, 0),
    ],
)
def test_math(answer, response, accuracy, form):
    parts = score("math", answer, response)
    assert (parts["accuracy"], parts["format"]) == (accuracy, form)
    assert parts["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)


def test_exact():
    assert score("exact", "red", " red\n") == {"overall": 1.0, "accuracy": 1.0}
    assert score("exact", "red", "I see <answer> red </answer>")["overall"] == 1.0
    assert score("exact", "red", "Red")["overall"] == 0.0


@pytest.mark.parametrize("name", ["exact", "math", "r1v"])
@pytest.mark.parametrize("answer", ["2", "<answer> 2\n</answer>", "<think>1 + 1, not 3</think>\n<answer>2</answer>"])
def test_the_reference_is_taken_out_of_the_text_of_the_row(name, answer):
    right, wrong = r"<think>a</think><answer>2</answer> \boxed{2}", r"<think>a</think><answer>3</answer> \boxed{3}"
    assert score(name, answer, right)["accuracy"] == 1.0
    assert score(name, answer, wrong)["accuracy"] == 0.0


def test_every_built_in_reward_scores_a_batch_in_order():
    prompts = [Prompt(i, Row("f:1", "q", str(i)), (), ()) for i in range(3)]
    completions = [Completion(i, 0, (), (), r"<answer>\boxed{1}</answer>", False) for i in range(3)]
    for name in REWARDS:
        reward = load_reward(name, 0.1)
        assert reward.name == name
        results = reward(prompts, completions)
        assert len(results) == 3 and all("overall" in parts for parts in results)
        with pytest.raises(ValueError):
            reward(prompts, completions[:2])


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"

    def write(body: str) -> str:
        path.write_text(f"import math\n\ndef good(prompts, completions):\n    return {body}\n")
        return f"{path}:good"

    return write


def test_a_users_own_reward(user_file):
    name = user_file("[{'overall': len(c.text), 'length': 1} for c in completions]")
    assert score(name, "x", "four") == {"overall": 4.0, "length": 1.0}
    assert load_reward(name, 0.1).name == name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[]", "returned 0 items for 1 completions"),
        ("None", "returned NoneType for 1 completions"),
        ("[1.0]", "return a dict with the key 'overall'"),
        ("[{'score': 1}]", "return a dict with the key 'overall'"),
        ("[{'overall': math.nan}]", "overall=nan; return finite numbers"),
        ("[{'overall': 1, 'why': 'x'}]", "why='x'; return finite numbers"),
    ],
)
def test_a_users_reward_that_returns_nonsense(user_file, body, expected):
    with pytest.raises(ValueError, match="reward.name=") as caught:
        score(user_file(body), "x", "y")
    assert expected in str(caught.value)


def test_a_bug_in_a_users_reward_propagates(user_file):
    with pytest.raises(ZeroDivisionError):
        score(user_file("1 / 0"), "x", "y")


def test_names_that_lead_nowhere(user_file, tmp_path):
    mine = user_file("[]").removesuffix("good")
    cases = {
        "maths": "did you mean 'math'?",
        "zzz": "built in: exact, math, r1v",
        f"{tmp_path}/none.py:f": "there is no Python file",
        f"{mine}bad": "has no function 'bad'; it has good",
        f"{mine}math": "has no function 'math'",
    }
    for name, expected in cases.items():
        with pytest.raises(ValueError) as caught:
            load_reward(name, 0.1)
        assert expected in str(caught.value), name
