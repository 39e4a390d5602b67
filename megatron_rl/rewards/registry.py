# SPDX-License-Identifier: Apache-2.0
"""Rewards by name, or a function of the user's own by `path/to/file.py:function`. Imports no torch."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.rewards.exact import ExactReward
from megatron_rl.rewards.math import MathReward
from megatron_rl.rewards.r1v import R1VReward
from megatron_rl.rewards.terms import OVERALL, WeightedReward, terms_problem, with_overall

if TYPE_CHECKING:
    from megatron_rl.protocols import PartsFunction, RewardFunction
    from megatron_rl.types import Completion, Prompt

REWARDS: dict[str, PartsFunction] = {"exact": ExactReward(), "math": MathReward(), "r1v": R1VReward()}

_Function = Callable[["Sequence[Prompt]", "Sequence[Completion]"], "list[dict[str, float]]"]


def load_reward(name: str, terms: Mapping[str, float]) -> RewardFunction:
    """The reward called `name`, whose overall weighs its parts by `terms`; empty = by the reward's own weights.

    Raises ValueError when there is no such reward, the user's file has no such function, or `terms` names a part that
    the reward does not have (a user's function need not declare its parts: then that is found in the first batch).
    """
    if name in REWARDS:
        reward = REWARDS[name]
        if problem := terms_problem(name, terms, reward.terms):
            raise ValueError(problem)
        return WeightedReward(reward, terms or reward.terms)
    path, colon, function = name.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        guess = f"did you mean '{close[0]}'?" if close else f"built in: {', '.join(REWARDS)}"
        raise ValueError(f"reward.name={name}: no such reward; {guess} Your own is path/to/file.py:function")
    found = _load_function(name, Path(path), function)
    declared = _declared_parts(name, found)
    if declared and (problem := terms_problem(name, terms, declared)):
        raise ValueError(problem)
    if declared and not terms:
        raise ValueError(f"reward.terms=: reward.name={name} returns {', '.join(declared)}; give their weights")
    return UserReward(name, found, terms, declared)


@dataclass(frozen=True)
class UserReward:
    """A user's function, with its result checked: one dict of numbers per completion.

    Without `terms` the function gives "overall" itself. With `terms` it gives parts only, in every row all that `terms`
    names; where it declares the `parts` that rows may have, a row may lack some, which then add nothing.
    """

    name: str
    function: _Function
    terms: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        results = self.function(prompts, completions)
        if not isinstance(results, list) or len(results) != len(completions):
            found = f"{len(results)} items" if isinstance(results, list) else type(results).__name__
            wanted = f"{len(completions)} completions; return a list with one dict for each"
            raise ValueError(f"reward.name={self.name}: returned {found} for {wanted}")
        return [self._checked(parts) for parts in results]

    def _checked(self, parts: dict[str, float]) -> dict[str, float]:
        if problem := self._problem(parts):
            raise ValueError(f"reward.name={self.name}: returned {problem}")
        numbers = {key: float(value) for key, value in parts.items()}
        return with_overall(numbers, self.terms) if self.terms else numbers

    def _problem(self, parts: object) -> str | None:
        if not isinstance(parts, dict):
            return f"{parts!r} for one completion; return a dict of its parts"
        for key, value in parts.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                return f"{key}={value!r}; return finite numbers"
        if not self.terms:
            fix = f"return a dict with the key '{OVERALL}', or set reward.terms to the weights of the parts"
            return None if OVERALL in parts else f"{parts!r}; {fix}"
        if OVERALL in parts:
            return (
                f"'{OVERALL}' itself, and reward.terms would make it of the parts; empty reward.terms or return parts"
            )
        missing = [name for name in self.terms if name not in parts]
        if self.parts and len(missing) == len(self.terms):
            return f"{parts!r}, none of reward.terms ({', '.join(missing)}); name a part of that row there"
        if missing and not self.parts:
            fix = "return it in every row, or declare the parts that rows may have: <function>.parts = (...)"
            return f"{parts!r}, without {', '.join(missing)} of reward.terms; {fix}"
        return None


def _declared_parts(name: str, function: _Function) -> tuple[str, ...]:
    """The names in the attribute `parts` of a user's function; empty where it has none."""
    parts = getattr(function, "parts", ())
    if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"reward.name={name}: its parts are {parts!r}; use a tuple of names")
    return parts


def _load_function(name: str, path: Path, function: str) -> _Function:
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"reward.name={name}: there is no Python file {path}; write path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling in the user's file look their module up here
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"reward.name={name}: {path} has no function '{function}'; it has {', '.join(known) or 'none'}"
        )
    return found
