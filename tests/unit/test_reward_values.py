# SPDX-License-Identifier: Apache-2.0
"""What counts as the value of a reference: properties that no prose may break, and the process that compares."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction

import pytest

from megatron_rl.rewards import values
from megatron_rl.rewards.registry import load_reward, open_reward
from megatron_rl.rewards.value_process import ValueProcess
from megatron_rl.rewards.values import GradingGivenUp, close_value_process, is_comparable, same_value
from megatron_rl.types import Completion, Prompt, Row

TOWER = "9^{9^{9^{9}}}"


def accuracy(name: str, answer: str, text: str, truncated: bool = False, missing: str = "default") -> float:
    reward = load_reward(name, {}, missing)
    part = reward([Prompt(0, Row("f:1", "q", answer), ())], [Completion(0, 0, (), (), text, truncated)])[0]["accuracy"]
    assert isinstance(part, float)
    return part


@pytest.fixture(scope="module", autouse=True)
def ended_process():
    yield
    close_value_process()


VALUES = ["97", "-3", "3.5", r"\frac{3}{4}", "1,234", "2^{10}"]
AROUND = [
    "{} apples",
    "about {}",
    "the answer is {}",
    "18 is larger than {}",
    "not {}",
    "{} or so",
    "{} m",
    "{}kg",
    r"{} \text{{ cm}}",
    "{}%",
    r"{}\%",
    r"{}^\circ",
    "~{}",
    r"\approx {}",
    r"\neq {}",
    r"\not= {}",
    "≠ {}",
    "!{}",
    "{}?",
    "--{}",
    "18 < {}",
    "{} > 18",
    "18 = {}",
    "{} = 18",
    "{0} = {0}",
    r"18 \le {}",
    r"x \in {}",
    "{}, 18",
    "18, {}",
    "{}; 18",
    "{} 18",
    "18 {}",
    "{} and 18",
    r"{} \quad 18",
    r"{} \text{{ or }} 18",
    r"{} \\ 18",
    r"\{{{}, 18\}}",
    r"{} \pm 18",
    "{} +",
    "({}",
    "{})",
    "18}} \\boxed{{{}",
]


@pytest.mark.parametrize("form", AROUND)
def test_what_is_around_a_value_makes_it_wrong(form):
    """Prose, wrong relations, a second value, a negation, a unit of its own, an unfinished term: in every grader."""
    for reference in VALUES:
        text = form.format(reference)
        assert not same_value(text, reference), text
        assert accuracy("r1v", reference, f"<think>a</think><answer>{text}</answer>") == 0, text
        assert accuracy("math", reference, rf"\boxed{{{text}}}") == 0 or "boxed" in form, text
        assert accuracy("r1v", reference, text, missing="whole_response") == 0, text


def test_a_value_alone_is_right_however_it_is_written():
    """Numbers that Python's fractions know, in the ways people write them; and no neighbour of theirs."""
    generator = random.Random(0)
    for _ in range(20):
        number = Fraction(generator.randrange(-2000, 2000), generator.choice([1, 2, 4, 5, 8]))
        sign, top, bottom = "-" if number < 0 else "", abs(number.numerator), number.denominator
        forms = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", f"${sign}{top}/{bottom}$"]
        forms += [f"{float(number)}", f"x = {float(number)}", f"{float(number):,}", f"({float(number)})"]
        written = generator.choice(forms[:4])
        near = str(float(number + generator.choice([-1, 1, Fraction(1, 10), -2 * number or 1])))
        assert all(same_value(form, written) for form in forms), (forms, written)
        assert not same_value(near, written), (near, written)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("97 km", "97 km", True),
        ("97km", "97 km", True),
        ("97.0 km", "97 km", True),
        ("97", "97 km", True),
        ("97 m", "97 km", False),
        ("96 km", "97 km", False),
        (r"5\text{ cm}", r"5 \text{ cm}", True),
        (r"5 \text{ m}", r"5 \text{ cm}", False),
        ("97\\%", "97%", True),
        ("96%", "97%", False),
        ("90°", r"90^\circ", True),
        ("3 < x", "x > 3", True),
        ("x < 3", "x > 3", False),
        ("y = 2x + 1", "y = 1 + 2x", True),
        ("18 = 5", "x = 5", False),
        ("2, 1", "1, 2", True),
        ("1, 3", "1, 2", False),
        ("(2, 1)", "(1, 2)", False),
        (r"\frac 1 2", "0.5", True),
        ("90 7", "97", False),
        ("12:30", "12:30", False),
        ("5!", "120", True),
        (r"\sqrt{16}", "4", True),
        (r"1\,234", "1234", True),
        ("-(-4)", "4", True),
    ],
)
def test_an_answer_may_hold_what_the_reference_holds(answer, reference, expected):
    assert same_value(answer, reference) is expected


def test_the_sentence_that_a_model_was_paid_for():
    sentence = "18 is larger than 97. They represent the"
    for truncated in (False, True):
        for missing in ("default", "wrong", "whole_response"):
            assert accuracy("r1v", "97", sentence, truncated, missing) == 0
    assert accuracy("r1v", "97", f"<answer>{sentence}</answer>") == 0
    assert accuracy("math", "97", rf"\boxed{{{sentence}}}") == 0


@pytest.mark.parametrize(
    ("text", "truncated", "missing", "expected"),
    [
        ("97", False, "default", 0),
        ("97", False, "wrong", 0),
        ("97", False, "whole_response", 1),
        ("97", True, "whole_response", 0),
        ("<answer>97", False, "whole_response", 0),
        ("<answer>97</answer>", False, "default", 1),
        ("<answer>97</answer> and so on", True, "default", 1),
        ("<answer>97", True, "default", 0),
        ("<answer>97</answer>, or rather <answer>98", True, "default", 0),
        ("<answer>97</answer>, or rather <answer>98", False, "default", 1),
    ],
)
def test_what_a_missing_or_unfinished_answer_means(text, truncated, missing, expected):
    assert accuracy("r1v", "97", text, truncated, missing) == expected


def test_an_unfinished_box_is_no_answer():
    assert accuracy("math", "97", r"\boxed{97} no, \boxed{9", truncated=True) == 0
    assert accuracy("math", "97", r"\boxed{97} and so on", truncated=True) == 1
    assert accuracy("math", "97", r"\boxed{97", truncated=True) == 0


@pytest.mark.parametrize("text", ["red", "red\n", "<answer>red</answer>"])
def test_exact_takes_the_whole_response_unless_told_otherwise(text):
    for truncated in (False, True):
        assert accuracy("exact", "red", text, truncated) == 1
        assert accuracy("exact", "red", text, truncated, "wrong") == float("answer" in text)


def test_rewards_without_answer_spans_have_no_such_setting(tmp_path):
    for name in ("math", f"{tmp_path}/mine.py:f"):
        with pytest.raises(ValueError) as caught:
            load_reward(name, {"acuracy": 1.0}, "wrong")
        assert str(caught.value).startswith(f"reward.missing_answer=wrong: reward.name={name} does not read <answer>")
    assert "(exact and r1v do); leave it out" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        load_reward("math", {"acuracy": 1.0}, "wrong")
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "reward.missing_answer",
        "reward.terms.acuracy",
    ]


def test_no_unbalanced_brace_reaches_the_parser():
    assert not is_comparable("18} + {97", "97")
    assert not is_comparable("{97", "97")
    assert is_comparable("{97}", "97")


# --------------------------------------------------------------------------------------------------------- the process


def test_a_runaway_expression_ends_at_its_limit_on_any_thread():
    """math-verify's own limit is off on other threads, where this held the interpreter's lock until the end."""
    process, replies = ValueProcess(cpu_seconds=0.5), []
    thread = threading.Thread(target=lambda: replies.append(process.compare(TOWER, "1")))
    try:
        thread.start()
        thread.join(60)
        assert replies == [None]
        first = process.pid
        assert [process.compare("1/2", "0.5"), process.compare("1", "2")] == [True, False]
        assert process.pid == first, "only the comparison was ended"
    finally:
        process.close()
    assert process.pid is None


def test_a_reference_that_is_too_hard_costs_its_limit_once(monkeypatch):
    asked = []

    class Slow:
        def compare(self, answer: str, reference: str) -> bool | None:
            asked.append((answer, reference))
            return None if TOWER in (answer, reference) else answer == reference

    monkeypatch.setattr(values, "_PROCESS", Slow())
    values._verified.cache_clear()
    monkeypatch.setattr(values, "_TOO_HARD", set())
    with pytest.warns(GradingGivenUp, match="every answer to it that is not the same text is wrong"):
        assert not any(same_value(str(number), TOWER) for number in range(100))
    assert asked == [("0", TOWER), (TOWER, TOWER)]
    with pytest.warns(GradingGivenUp, match="the answer .* is wrong"):
        assert not same_value(TOWER, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not same_value(TOWER, "1"), "remembered"
        assert same_value("1", "1") and same_value("1", "1")
    assert asked[2:] == [(TOWER, "1"), ("1", "1"), ("1", "1")]
    values._verified.cache_clear()


def test_a_killed_process_is_started_again():
    process = ValueProcess()
    try:
        assert process.compare("1", "1.0")
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert process.compare("1", "1.0") and process.pid != first
    finally:
        process.close()


def test_a_stopped_process_is_replaced():
    process = ValueProcess(wall_seconds=3)
    try:
        assert process.compare("1", "1.0")
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        assert process.compare("1", "1.0") and process.pid != first
    finally:
        process.close()


def test_signals_for_the_ranks_do_not_end_it():
    process = ValueProcess()
    try:
        assert process.compare("1", "1.0")
        first = process.pid
        assert first is not None and os.getpgid(first) != os.getpgid(0), "Ctrl-C goes to the group of the ranks"
        os.kill(first, signal.SIGTERM)
        os.kill(first, signal.SIGINT)
        assert process.compare("2", "2.0") and process.pid == first
    finally:
        process.close()


def test_it_ends_with_the_run_and_with_the_process_that_asks():
    with open_reward("math", {}) as reward:
        reward([Prompt(0, Row("f:1", "q", "0.5"), ())], [Completion(0, 0, (), (), r"\boxed{\frac{2}{4}}", False)])
        values._verified.cache_clear()
        assert same_value("2/4", "0.5")
        pid = values._PROCESS.pid
        assert pid is not None
    assert not _is_alive(pid)
    script = (
        "import os; from megatron_rl.rewards import values; values.same_value('2/4', '0.5');"
        "print(values._PROCESS.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    told = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    deadline = time.monotonic() + 60
    while _is_alive(int(told.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(int(told.stdout))


def test_a_fork_starts_its_own():
    """The pipes of a parent are not shared: two processes would read each other's replies."""
    assert same_value("6/4", "1.5")
    values._verified.cache_clear()
    child = os.fork()
    if child == 0:
        pid = values._PROCESS.pid
        right = pid is None and same_value("6/4", "1.5")
        close_value_process()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same_value("6/4", "1.5")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
