# SPDX-License-Identifier: Apache-2.0
"""Rewards by name, or a function of the user's own by `path/to/file.py:function`. Imports no torch."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.rewards.exact import ExactReward
from megatron_rl.rewards.math import MathReward
from megatron_rl.rewards.r1v import R1VReward

if TYPE_CHECKING:
    from megatron_rl.protocols import RewardFunction
    from megatron_rl.types import Completion, Prompt

REWARDS: dict[str, Callable[[float], RewardFunction]] = {
    "exact": lambda format_weight: ExactReward(),
    "math": MathReward,
    "r1v": R1VReward,
}

_Function = Callable[["Sequence[Prompt]", "Sequence[Completion]"], "list[dict[str, float]]"]


def load_reward(name: str, format_weight: float) -> RewardFunction:
    """The reward called `name`; ValueError when there is none or the user's file has no such function."""
    if name in REWARDS:
        return REWARDS[name](format_weight)
    path, colon, function = name.rpartition(":")
    if not colon:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        guess = f"did you mean '{close[0]}'?" if close else f"built in: {', '.join(REWARDS)}"
        raise ValueError(f"reward.name={name}: no such reward; {guess} Your own is path/to/file.py:function")
    return UserReward(name, _load_function(name, Path(path), function))


@dataclass(frozen=True)
class UserReward:
    """A user's function, with its result checked: one dict of numbers per completion, "overall" among them."""

    name: str
    function: _Function

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        results = self.function(prompts, completions)
        if not isinstance(results, list) or len(results) != len(completions):
            found = f"{len(results)} items" if isinstance(results, list) else type(results).__name__
            wanted = f"{len(completions)} completions; return a list with one dict for each"
            raise ValueError(f"reward.name={self.name}: returned {found} for {wanted}")
        return [self._checked(parts) for parts in results]

    def _checked(self, parts: dict[str, float]) -> dict[str, float]:
        if not isinstance(parts, dict) or "overall" not in parts:
            raise ValueError(f"reward.name={self.name}: returned {parts!r}; return a dict with the key 'overall'")
        for key, value in parts.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"reward.name={self.name}: returned {key}={value!r}; return finite numbers")
        return {key: float(value) for key, value in parts.items()}


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
