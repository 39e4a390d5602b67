# SPDX-License-Identifier: Apache-2.0
"""Video question answering in the R1 style: the answer is right, and the response thinks before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import MissingAnswer, reference_answer, same_text
from megatron_rl.rewards.tags import ANSWER, is_think_then_answer, last_answer_span
from megatron_rl.rewards.values import is_value, same_value

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt


@dataclass(frozen=True)
class R1VReward:
    """accuracy: the answer is right; format: the response is `<think>...</think> <answer>...</answer>` and no more.

    The answer is the last `<answer>` span. A response without one is wrong, or, with missing_answer "whole_response",
    answers as a whole if it came to its end. Words are compared as text; a reference that is a number or a formula is
    compared as mathematics too.
    """

    missing_answer: MissingAnswer = "wrong"
    name: str = "r1v"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 0.9, "format": 0.1}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, completion: Completion) -> dict[str, float]:
        answer = last_answer_span(completion.text, completion.truncated)
        whole = self.missing_answer == "whole_response" and ANSWER not in completion.text and not completion.truncated
        if answer is None and whole:
            answer = completion.text
        right = answer is not None and (
            same_text(answer, reference) or (is_value(reference) and same_value(answer, reference))
        )
        return {"accuracy": float(right), "format": float(is_think_then_answer(completion.text))}
