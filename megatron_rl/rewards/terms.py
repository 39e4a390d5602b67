# SPDX-License-Identifier: Apache-2.0
"""The overall reward: the weighted sum of a reward's named parts, `reward.terms` in a recipe. Computed here only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.protocols import PartsFunction
    from megatron_rl.types import Completion, Prompt

OVERALL = "overall"


def with_overall(parts: Mapping[str, float], terms: Mapping[str, float]) -> dict[str, float]:
    """The parts of one completion behind their weighted sum, over those terms that it has, correctly rounded."""
    total = math.fsum(weight * parts[name] for name, weight in terms.items() if name in parts)
    return {OVERALL: total, **parts}


def terms_problem(reward: str, terms: Mapping[str, float], parts: Collection[str]) -> str | None:
    """What is wrong with terms that name parts which the reward does not have."""
    unknown = [name for name in terms if name not in parts]
    if not unknown:
        return None
    given = " ".join(f"reward.terms.{name}={terms[name]}" for name in unknown)
    return f"{given}: reward.name={reward} has no such part; it has {', '.join(parts)}"


@dataclass(frozen=True)
class WeightedReward:
    """A reward that returns parts, and the weights with which they make the overall reward."""

    function: PartsFunction
    terms: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.function.name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [with_overall(parts, self.terms) for parts in self.function(prompts, completions)]
