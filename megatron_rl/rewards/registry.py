# SPDX-License-Identifier: Apache-2.0
"""Rewards by name, or a function of the user's own by `path/to/file.py:function`. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_rl.rewards.exact import ExactReward
from megatron_rl.rewards.math import MathReward
from megatron_rl.rewards.r1v import R1VReward
from megatron_rl.rewards.terms import WeightedReward, terms_problem
from megatron_rl.rewards.user_file import load_function
from megatron_rl.rewards.user_reward import UserReward, declared_parts
from megatron_rl.rewards.values import close_value_process

if TYPE_CHECKING:
    from megatron_rl.protocols import PartsFunction, RewardFunction
    from megatron_rl.rewards.grading import MissingAnswer

REWARDS: dict[str, PartsFunction] = {"exact": ExactReward(), "math": MathReward(), "r1v": R1VReward()}
_READ_ANSWER_TAGS: dict[str, Callable[[MissingAnswer], PartsFunction]] = {"exact": ExactReward, "r1v": R1VReward}


@contextmanager
def open_reward(
    name: str, terms: Mapping[str, float], missing_answer: MissingAnswer | Literal["default"] = "default"
) -> Iterator[RewardFunction]:
    """`load_reward` for a run: the process that compares values ends with it."""
    try:
        yield load_reward(name, terms, missing_answer)
    finally:
        close_value_process()


def load_reward(
    name: str, terms: Mapping[str, float], missing_answer: MissingAnswer | Literal["default"] = "default"
) -> RewardFunction:
    """The reward called `name`, whose overall weighs its parts by `terms`; empty = by the reward's own weights.

    Raises ValueError when there is no such reward, the user's file cannot be read or has no such function, `terms`
    names a part that the reward does not have (a user's function need not declare its parts: then that is found in the
    first batch), or `missing_answer` is given for a reward that reads no `<answer>` spans. One line per problem.
    """
    problems = []
    if missing_answer != "default" and name not in _READ_ANSWER_TAGS:
        why = f"reward.name={name} does not read <answer> spans by it ({' and '.join(_READ_ANSWER_TAGS)} do)"
        problems.append(f"reward.missing_answer={missing_answer}: {why}; leave it out")
    if name in REWARDS:
        reward = REWARDS[name]
        if problem := terms_problem(name, terms, reward.terms):
            problems.append(problem)
        _raise_all(problems)
        if missing_answer != "default":
            reward = _READ_ANSWER_TAGS[name](missing_answer)
        return WeightedReward(reward, terms or reward.terms)
    path, colon, function = name.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        guess = f"did you mean '{close[0]}'?" if close else f"built in: {', '.join(REWARDS)}."
        _raise_all([*problems, f"reward.name={name}: no such reward; {guess} Your own is path/to/file.py:function"])
    _raise_all(problems)
    return _user_reward(name, Path(path).expanduser(), function, terms)


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _user_reward(name: str, path: Path, function: str, terms: Mapping[str, float]) -> UserReward:
    found = load_function(name, path, function)
    declared = declared_parts(name, found)
    if declared and (problem := terms_problem(name, terms, declared)):
        raise ValueError(problem)
    if declared and not terms:
        raise ValueError(f"reward.terms=: reward.name={name} returns {', '.join(declared)}; give their weights")
    return UserReward(name, found, terms, declared)
