# SPDX-License-Identifier: Apache-2.0
"""Exact match: 1 when the answer is the reference, letter by letter, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import last_answer_span, reference_answer

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt


@dataclass(frozen=True)
class ExactReward:
    """The answer is the last `<answer>` span, or the whole response when there is none; outer blanks do not count."""

    name: str = "exact"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 1.0}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c.text) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, response: str) -> dict[str, float]:
        span = last_answer_span(response)
        return {"accuracy": float((response if span is None else span).strip() == reference)}
