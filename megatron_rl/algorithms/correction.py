# SPDX-License-Identifier: Apache-2.0
"""Corrections for sampling from another distribution than the trainer's: the engine computes the same weights with
other kernels, in another precision, or holds older ones.

pi(old) is the trainer's probability of a sampled token at the weights that sampled, pi(rollout) the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.types import Corrected, LossInputs, LossOutput

if TYPE_CHECKING:
    from megatron_rl.config.schema import AlgorithmConfig
    from megatron_rl.protocols import Correction, PolicyLoss


@dataclass(frozen=True)
class TruncatedImportanceSampling:
    """min(pi(old) / pi(rollout), cap) for each token (Ionides 2008; for this mismatch Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training")."""

    cap: float = 2.0

    def __call__(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Corrected:
        ratio = (old_logprobs - rollout_logprobs).clamp(max=math.log(self.cap)).exp()
        return Corrected(ratio, torch.ones_like(ratio, dtype=torch.bool))


@dataclass(frozen=True)
class CorrectedLoss:
    """A policy loss whose tokens are weighed by a correction. Tokens that it does not keep have weight 0; the global
    token count, which divides the loss, still holds them."""

    loss: PolicyLoss
    correction: Correction

    def __call__(self, inputs: LossInputs) -> LossOutput:
        with torch.no_grad():
            corrected = self.correction(inputs.old_logprobs, inputs.rollout_logprobs)
            factor = torch.where(corrected.keep, corrected.weight, 0.0)
        output = self.loss(replace(inputs, weights=inputs.weights * factor))
        active = inputs.weights > 0
        count = active.sum().float()
        metrics = {
            "correction/weight_mean": (factor[active].sum(), count),
            "correction/kept_fraction": (corrected.keep[active].sum().float(), count),
        }
        return LossOutput(output.loss_sum, output.metrics | metrics)


CORRECTIONS: dict[str, Callable[[AlgorithmConfig], Correction]] = {
    "tis": lambda settings: TruncatedImportanceSampling(settings.correction_cap),
}
"""By `algorithm.correction`; "none" is no correction."""
