# SPDX-License-Identifier: Apache-2.0
"""Rewards against answers graded by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from megatron_rl.rewards.grading import same_text
from megatron_rl.rewards.registry import REWARDS, load_reward
from megatron_rl.rewards.tags import last_answer_span, last_boxed
from megatron_rl.rewards.values import is_value, same_value
from megatron_rl.types import Completion, Prompt, Row


def score(name: str, answer: str, response: str, terms: Mapping[str, float] | None = None) -> dict[str, float]:
    prompt = Prompt(0, Row("f:1", "q", answer), (), ())
    completion = Completion(0, 0, (), (), response, False)
    return load_reward(name, terms or {})([prompt], [completion])[0]


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
        ("12 apples", "12", False),
        ("11, 12, 13", "12", False),
        ("", "12", False),
        ("12 " + "and so on " * 100, "12", False),
    ],
)
def test_same_value(predicted, reference, expected):
    assert same_value(predicted, reference) is expected


def test_values_are_told_from_words():
    assert [is_value(text) for text in ("12", "-3.5", r"\frac{1}{2}", "x^2+1")] == [True] * 4
    assert [is_value(text) for text in ("left", "3 men", "été", "12:30")] == [False] * 4


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
        ("B", "B", 0, 0),
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


def test_terms_weigh_the_parts():
    assert score("r1v", "B", "<answer>B</answer>", {"accuracy": 0.5, "format": 0.5})["overall"] == 0.5
    assert score("math", "2", r"<think>x</think> \boxed{3}", {"format": 0.25, "accuracy": 3.0})["overall"] == 0.25
    only_accuracy = score("r1v", "B", "<think>a</think><answer>C</answer>", {"accuracy": 1.0})
    assert only_accuracy == {"overall": 0.0, "accuracy": 0.0, "format": 1.0}, "a part without a weight is still told"


def test_the_default_terms_make_the_overall_of_before_bit_for_bit():
    """`format_weight` was 0.1: overall = (1 - 0.1) * accuracy + 0.1 * format, in doubles."""
    texts = {
        "r1v": ("<think>a</think><answer>{}</answer>", "<answer>{}</answer>"),
        "math": (r"<think>a</think> \boxed{{{}}}", r"\boxed{{{}}}"),
    }
    for name, (thinks, does_not) in texts.items():
        for accuracy in (0.0, 1.0):
            for form, text in ((1.0, thinks), (0.0, does_not)):
                parts = score(name, "2", text.format(2 if accuracy else 3))
                weight = 0.1
                expected = (1 - weight) * accuracy + weight * form
                assert list(parts.items()) == [("overall", expected), ("accuracy", accuracy), ("format", form)]


def test_terms_that_the_reward_does_not_have():
    with pytest.raises(ValueError) as caught:
        load_reward("exact", {"accuracy": 0.9, "format": 0.1, "length": 1.0})
    expected = "reward.terms.format=0.1 reward.terms.length=1.0: reward.name=exact has no such part; it has accuracy"
    assert str(caught.value) == expected


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
        reward = load_reward(name, {})
        assert reward.name == name
        results = reward(prompts, completions)
        assert len(results) == 3 and all("overall" in parts for parts in results)
        with pytest.raises(ValueError):
            reward(prompts, completions[:2])


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"

    def write(body: str, parts: str = "()") -> str:
        path.write_text(f"import math\n\ndef good(prompts, completions):\n    return {body}\n\ngood.parts = {parts}\n")
        return f"{path}:good"

    return write


def test_a_users_own_reward(user_file):
    name = user_file("[{'overall': len(c.text), 'length': 1} for c in completions]")
    assert score(name, "x", "four") == {"overall": 4.0, "length": 1.0}
    assert load_reward(name, {}).name == name


def test_a_users_parts_are_weighed_by_the_terms(user_file):
    name = user_file("[{'right': 1, 'length': len(c.text)} for c in completions]")
    terms = {"right": 2.0, "length": -0.25}
    assert score(name, "x", "four", terms) == {"overall": 1.0, "right": 1.0, "length": 4.0}


def test_rows_of_one_batch_may_have_different_parts(user_file):
    """A part that the terms name may be missing where the function declares which parts there are."""
    body = "[{'accuracy': 1.0} if c.text else {'accuracy': 1.0, 'judge': 0.5} for c in completions]"
    prompts = [Prompt(i, Row("f:1", "q", ""), (), ()) for i in range(2)]
    completions = [Completion(i, 0, (), (), text, False) for i, text in enumerate(("a", ""))]
    terms = {"accuracy": 0.5, "judge": 2.0}
    with pytest.raises(ValueError, match="without judge of reward.terms"):
        load_reward(user_file(body), terms)(prompts, completions)
    reward = load_reward(user_file(body, parts="('accuracy', 'judge')"), terms)
    assert reward(prompts, completions) == [
        {"overall": 0.5, "accuracy": 1.0},
        {"overall": 1.5, "accuracy": 1.0, "judge": 0.5},
    ]
    free = user_file("[{'overall': 1.0} if c.text else {'overall': 0.0, 'judge': 0.5} for c in completions]")
    assert load_reward(free, {})(prompts, completions) == [{"overall": 1.0}, {"overall": 0.0, "judge": 0.5}]


@pytest.mark.parametrize(
    ("parts", "terms", "expected"),
    [
        ("('accuracy', 'judge')", {"juge": 1.0}, "has no such part; it has accuracy, judge"),
        ("('accuracy', 'judge')", {}, "returns accuracy, judge; give their weights"),
        ("['accuracy']", {"accuracy": 1.0}, "its parts are ['accuracy']; use a tuple of names"),
    ],
)
def test_declared_parts_are_checked_before_the_run(user_file, parts, terms, expected):
    with pytest.raises(ValueError) as caught:
        load_reward(user_file("[]", parts=parts), terms)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("body", "parts", "expected"),
    [
        ("[{'overall': 1.0}]", "()", "returned 'overall' itself, and reward.terms would make it of the parts"),
        ("[{'format': 1.0}]", "()", "without accuracy of reward.terms; return it in every row, or declare the parts"),
        ("[{'judge': 1.0}]", "('accuracy', 'judge')", "none of reward.terms (accuracy)"),
    ],
)
def test_what_a_users_function_returns_beside_terms(user_file, body, parts, expected):
    with pytest.raises(ValueError, match="reward.name=") as caught:
        score(user_file(body, parts=parts), "x", "y", {"accuracy": 1.0})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[]", "returned 0 items for 1 completions"),
        ("None", "returned NoneType for 1 completions"),
        ("[1.0]", "returned 1.0 for one completion; return a dict of its parts"),
        ("[{'score': 1}]", "return a dict with the key 'overall'"),
        ("[{'overall': math.nan}]", "overall=nan; return finite numbers"),
        ("[{'overall': 'x'}]", "overall='x', a text; return a number as overall"),
        ("[{'overall': None}]", "return a dict with the key 'overall'"),
        ("[{'overall': 1, 'why': ['x']}]", "why=['x']; return finite numbers, or text for the log"),
        ("[{'overall': 10**400, 'a': 1j}]", "a=1j; return finite numbers"),
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
            load_reward(name, {})
        assert expected in str(caught.value), name
