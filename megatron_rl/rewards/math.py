# SPDX-License-Identifier: Apache-2.0
r"""Mathematics: the last \boxed{...} has the value of the reference, and the response thinks before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import reference_answer, same_text
from megatron_rl.rewards.tags import is_think_then_box, last_boxed
from megatron_rl.rewards.values import same_value

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt


@dataclass(frozen=True)
class MathReward:
    """accuracy: the box holds the reference; without a box it is 0. format: it thinks, then gives a box."""

    name: str = "math"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 0.9, "format": 0.1}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, completion: Completion) -> dict[str, float]:
        boxed = last_boxed(completion.text, completion.truncated)
        right = boxed is not None and (same_text(boxed, reference) or same_value(boxed, reference))
        return {"accuracy": float(right), "format": float(is_think_then_box(completion.text))}
