# SPDX-License-Identifier: Apache-2.0
"""What docs/rewards.md says about values and options, and its example, run."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from megatron_rl.rewards.grading import same_text
from megatron_rl.rewards.registry import REWARDS, load_reward
from megatron_rl.rewards.values import close_value_process, same_value
from megatron_rl.types import Completion, Prompt, Row

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def codes(text: str) -> list[str]:
    """Between single backticks, or double ones with a space inside."""
    return [double or single for double, single in re.findall(r"`` (.+?) ``|`([^`]+)`", text)]


def test_the_table_of_values():
    rows = [line.strip("|").split("|") for line in section("Values").splitlines() if line.startswith("|")][2:]
    assert len(rows) == 10
    try:
        for _, reference, right, wrong in rows:
            (value,) = codes(reference)
            for expected, answers in ((True, codes(right)), (False, codes(wrong))):
                assert answers
                for answer in answers:
                    assert (same_text(answer, value) or same_value(answer, value)) is expected, (answer, value)
    finally:
        close_value_process()


def test_the_ways_of_naming_an_option():
    lines = [line for line in section("Options").splitlines() if line.startswith("- ")]
    answers = codes(lines[0]) + ["Option B", "Choice B", "Answer: B", "The answer is B", "The correct answer is B"]
    assert len(answers) == 16
    assert all(same_text(answer, "B") and same_text(answer, "B. The blue car") for answer in answers)
    wrong = codes(section("Options").partition("\nWrong are")[2].replace("\n", " "))
    assert len(wrong) == 7
    assert not any(same_text(answer, "B") or same_text(answer, "B. The blue car") for answer in wrong)


def test_the_table_of_rewards():
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| `(exact|r1v|math)` ", line)]
    told = {codes(row[0])[0]: codes(row[-1])[0] for row in rows}
    expected = {name: str(dict(reward.terms)).replace("'", "") for name, reward in REWARDS.items()}
    assert told == expected


def test_the_example(tmp_path):
    body = section("A function of your own").partition("\n- ")[0]
    (tmp_path / "my_reward.py").write_text(textwrap.dedent(body), encoding="utf-8")
    reward = load_reward(f"{tmp_path}/my_reward.py:grade", {"accuracy": 1.0, "short": 0.1})
    parts = reward(
        [Prompt(0, Row("f:1", "q", "B"), ())], [Completion(0, 0, (), (), "<answer>Option B</answer>", False)]
    )
    assert parts == [{"overall": 1.1, "accuracy": 1.0, "short": 1.0, "reason": "Option B"}]
