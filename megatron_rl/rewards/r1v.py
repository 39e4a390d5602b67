# SPDX-License-Identifier: Apache-2.0
"""Video question answering in the R1 style: the answer is right, and the response thinks before it answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.rewards.grading import is_value, last_answer_span, reference_answer, same_text, same_value

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt

_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


@dataclass(frozen=True)
class R1VReward:
    """accuracy: the answer is right; format: the response is `<think>...</think> <answer>...</answer>` and no more.

    The answer is the last `<answer>` span, or the whole response when there is none. Words are compared as text;
    a reference that is a number or a formula is compared as mathematics too.
    """

    name: str = "r1v"

    @property
    def terms(self) -> dict[str, float]:
        return {"accuracy": 0.9, "format": 0.1}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        return [self._parts(reference_answer(p.row.answer), c.text) for p, c in zip(prompts, completions, strict=True)]

    def _parts(self, reference: str, response: str) -> dict[str, float]:
        span = last_answer_span(response)
        predicted = response if span is None else span
        right = same_text(predicted, reference) or (is_value(reference) and same_value(predicted, reference))
        return {"accuracy": float(right), "format": float(_FORMAT.fullmatch(response.strip()) is not None)}
