# SPDX-License-Identifier: Apache-2.0
"""A reward function of one's own: what it may return, import and read, and how its faults are told."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_rl.rewards.registry import load_reward
from megatron_rl.rewards.user_reward import as_number
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.types import Completion, Group, Prompt, Row, Scored

PROMPT = Prompt(0, Row("f:1", "q", "<answer> B\n</answer>\n"), ())


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the file of a reward, named as nothing else is; gives its name in a recipe."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str, name: str = "own_reward") -> str:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return f"{tmp_path}/{name}.py:f"

    return write


def score(name: str, terms: dict[str, float] | None = None, truncated: bool = False) -> dict[str, float | str]:
    reward = load_reward(name, terms or {})
    return dict(reward([PROMPT], [Completion(0, 0, (), (), "text", truncated)])[0])


@pytest.mark.parametrize(
    "value",
    [
        "np.float32(0.5)",
        "np.float64(0.5)",
        "np.float16(0.5)",
        "np.array(0.5)",
        "np.array(0.5, np.float32)",
        "torch.tensor(0.5)",
        "torch.tensor(0.5, dtype=torch.bfloat16)",
        "torch.tensor(0.5, requires_grad=True)",
        "Fraction(1, 2)",
        "Decimal('0.5')",
    ],
)
def test_numbers_of_other_libraries_are_numbers(write, value):
    source = "import numpy as np, torch\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    name = write(source + f"def f(prompts, completions):\n    return [{{'overall': {value}, 'part': {value}}}]\n")
    found = score(name)
    assert found == {"overall": 0.5, "part": 0.5} and {type(part) for part in found.values()} == {float}
    assert score(write(source + f"def f(p, c):\n    return [{{'part': {value}}}]\n"), {"part": 2.0})["overall"] == 1.0


def test_what_is_a_number():
    for one in (1, True, np.int64(1), np.uint8(1), np.bool_(True), torch.tensor(1), torch.tensor(True), Fraction(1)):
        assert as_number(one) == 1.0 and type(as_number(one)) is float
    no_numbers = (np.nan, np.float32("inf"), 10**400, 1j, np.complex64(1), np.array([1.0]), torch.ones(1), "1", [1])
    for other in (*no_numbers, torch.tensor(float("nan")), np.array("1"), Decimal("nan"), Decimal("inf")):
        assert as_number(other) is None, other


def test_texts_are_kept_for_the_log_and_none_is_no_part(write, tmp_path):
    parts = "{'overall': 1, 'reason': 'good', 'judge': None}"
    name = write(f"def f(prompts, completions):\n    return [{parts}]\n")
    assert score(name) == {"overall": 1.0, "reason": "good"}
    weighed = write(
        "def f(prompts, completions):\n    return [{'a': None, 'b': 2, 'why': 'so'}]\nf.parts = ('a', 'b')\n"
    )
    assert score(weighed, {"a": 1.0, "b": 0.5}) == {"overall": 1.0, "b": 2.0, "why": "so"}
    with pytest.raises(ValueError, match="why='so', a text; return a number as why"):
        score(write("def f(p, c):\n    return [{'why': 'so'}]\n"), {"why": 1.0})
    with pytest.raises(ValueError, match="without a of reward.terms"):
        score(write("def f(p, c):\n    return [{'a': None, 'b': 1}]\n"), {"a": 1.0, "b": 1.0})


def test_notes_go_through_a_rollout_file(tmp_path):
    scored = Scored(Completion(0, 0, (5,), (-1.0,), "a", False), 1.0, {"overall": 1.0}, {"reason": "gut \u2028"})
    store = RolloutStore(tmp_path, writes=True)
    store.save(1, [Group(PROMPT, (scored,))])
    assert store.load(1) == [Group(PROMPT, (scored,))]
    line = json.loads((tmp_path / "step_1.jsonl").read_text(encoding="utf-8").rstrip("\n"))
    assert line["scored"][0]["notes"] == {"reason": "gut \u2028"}
    del line["scored"][0]["notes"]  # a file of before
    (tmp_path / "step_1.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert store.load(1)[0].scored[0].notes == {}


def test_a_reward_reads_the_answer_as_it_is_in_the_file_and_whether_the_response_was_cut_off(write):
    name = write(
        "def f(prompts, completions):\n"
        "    from megatron_rl.rewards.grading import reference_answer\n"
        "    row = prompts[0].row\n"
        "    return [{'overall': completions[0].truncated, 'raw': row.answer, 'taken': reference_answer(row.answer)}]\n"
    )
    expected = {"raw": "<answer> B\n</answer>\n", "taken": "B"}
    assert score(name) == {"overall": 0.0, **expected}
    assert score(name, truncated=True) == {"overall": 1.0, **expected}


def test_modules_beside_the_file(write, monkeypatch, tmp_path):
    write("def length(text):\n    return len(text)\n", "helper_beside_it")
    write("LATE = 2\n", "late_beside_it")
    source = (
        "from helper_beside_it import length\n\n"
        "def f(prompts, completions):\n"
        "    from late_beside_it import LATE\n"
        "    return [{'overall': LATE * length(c.text)} for c in completions]\n"
    )
    monkeypatch.chdir("/")
    assert score(write(source)) == {"overall": 8.0}
    assert sys.path.count(str(tmp_path)) == 1
    assert score(write(source)) == {"overall": 8.0}
    assert sys.path.count(str(tmp_path)) == 1 and sys.path[-1] == str(tmp_path), "it hides nothing"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'; install it, or put"),
        ("from json import no_such", "line 1: ImportError: cannot import name 'no_such' from 'json'"),
        ("\ndef f(:\n    pass", "own_reward.py line 2: invalid syntax; correct it"),
        ("def f():\npass", "own_reward.py line 2: expected an indented block"),
        ("x = 'a", "own_reward.py line 1: unterminated string literal"),
        ("\n\nx = y", "own_reward.py line 3: NameError: name 'y' is not defined; correct it"),
        ("open('no_such_file')", "line 1: FileNotFoundError"),
        ("x = {}['key']", "line 1: KeyError: 'key'; correct it"),
        ("import json\ng = json.loads\n", "has no function 'f'; it has g"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(write, source, expected):
    name = write(source)
    with pytest.raises(ValueError) as caught:
        load_reward(name, {})
    told = str(caught.value)
    assert told.startswith(f"reward.name={name}: ") and expected in told and "\n" not in told
    assert "user_reward_own_reward" not in sys.modules or "no function" in expected


def test_a_fault_of_a_module_beside_the_file(write):
    write("def g(:\n", "broken_beside_it")
    with pytest.raises(ValueError, match=r"broken_beside_it.py line 1: invalid syntax; correct it"):
        load_reward(write("import broken_beside_it"), {})


def test_a_module_beside_the_file_that_an_installed_one_hides(write):
    write("def own():\n    pass\n", "json")
    with pytest.raises(ValueError, match=r"json.py beside it is hidden by .*__init__.py: rename it"):
        load_reward(write("from json import own"), {})


def test_a_file_that_is_not_text(write, tmp_path):
    name = write("")
    (tmp_path / "own_reward.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(ValueError, match="own_reward.py"):
        load_reward(name, {})


def test_the_home_of_the_user_in_a_path(write, monkeypatch, tmp_path):
    write("def f(prompts, completions):\n    return [{'overall': 3}]\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert score("~/own_reward.py:f") == {"overall": 3.0}
