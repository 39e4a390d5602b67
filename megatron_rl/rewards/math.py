# SPDX-License-Identifier: Apache-2.0
r"""Mathematics: the last \boxed{...} has the value of the reference, and the response thinks before it answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import last_boxed, reference_answer, same_text, same_value

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt

_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


@dataclass(frozen=True)
class MathReward:
    """accuracy: the box holds the reference; without a box it is 0. format: it thinks, then gives a box."""

    name: str = "math"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 0.9, "format": 0.1}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c.text) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, response: str) -> dict[str, float]:
        boxed = last_boxed(response)
        right = boxed is not None and (same_text(boxed, reference) or same_value(boxed, reference))
        return {"accuracy": float(right), "format": float(_FORMAT.fullmatch(response.strip()) is not None)}
