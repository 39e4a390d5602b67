# SPDX-License-Identifier: Apache-2.0
"""Advantage of each response over the other responses to the same prompt. Plain floats, one group at a time.

r_i is the reward of response i, N the size of the group. A group in which every response has the same reward teaches
nothing: its advantages are exactly 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.protocols import AdvantageEstimator

_EPSILON = 1e-6


def grpo(rewards: Sequence[float]) -> list[float]:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): (r_i - mean) / (std + 1e-6), std with N - 1 in the denominator."""
    scale = statistics.stdev(rewards) + _EPSILON
    return [advantage / scale for advantage in dr_grpo(rewards)]


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): r_i - mean; hard and easy prompts are not blown up."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): r_i - mean of the others = (r_i - mean) * N / (N - 1)."""
    return [advantage * len(rewards) / (len(rewards) - 1) for advantage in dr_grpo(rewards)]


ADVANTAGES: dict[str, AdvantageEstimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
