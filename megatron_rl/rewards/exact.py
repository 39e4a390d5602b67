# SPDX-License-Identifier: Apache-2.0
"""Exact match: 1 when the answer is the reference, letter by letter, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import MissingAnswer, reference_answer
from megatron_rl.rewards.tags import last_answer_span

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt


@dataclass(frozen=True)
class ExactReward:
    """The answer is the last `<answer>` span, or, by default, the whole response when there is none; outer blanks do
    not count. No response can grow into the reference, so that one cut off at its end may be right."""

    missing_answer: MissingAnswer = "whole_response"
    name: str = "exact"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 1.0}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, completion: Completion) -> dict[str, float]:
        answer = last_answer_span(completion.text, completion.truncated)
        if answer is None and self.missing_answer == "whole_response":
            answer = completion.text.strip()
        return {"accuracy": float(answer == reference)}
