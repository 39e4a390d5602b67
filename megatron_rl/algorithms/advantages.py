# SPDX-License-Identifier: Apache-2.0
"""Advantages of the tokens of a global batch: estimators over scored groups.

r_i is the reward of response i, N the size of its group. The estimators here give every token of a response the same
advantage, measured over the other responses to the same prompt. A group in which every response has the same reward
teaches nothing: its advantages are exactly 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_rl.types import AdvantageInputs, Advantages

if TYPE_CHECKING:
    from megatron_rl.protocols import AdvantageEstimator

_EPSILON = 1e-6


def grpo(rewards: Sequence[float]) -> list[float]:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): (r_i - mean) / (std + 1e-6), std with N - 1 in the denominator."""
    scale = statistics.stdev(rewards) + _EPSILON
    return [advantage / scale for advantage in dr_grpo(rewards)]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): r_i - mean, unscaled: no prompt weighs more than another."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): r_i - mean of the others = (r_i - mean) * N / (N - 1)."""
    return [advantage * len(rewards) / (len(rewards) - 1) for advantage in dr_grpo(rewards)]


@dataclass(frozen=True)
class PerResponse:
    """An estimator from a function of the rewards of one group: one value for all tokens of a response."""

    of_group: Callable[[Sequence[float]], list[float]]

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        tokens = []
        for rewards, lengths in zip(inputs.rewards, inputs.num_tokens, strict=True):
            values = self.of_group(rewards)
            tokens.append(tuple(torch.full((n,), a) for a, n in zip(values, lengths, strict=True)))
        return Advantages(tuple(tokens))


ADVANTAGES: dict[str, AdvantageEstimator] = {
    "grpo": PerResponse(grpo),
    "dr_grpo": PerResponse(dr_grpo),
    "rloo": PerResponse(rloo),
}
