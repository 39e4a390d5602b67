# SPDX-License-Identifier: Apache-2.0
"""Losses over the response tokens of one micro-batch. They return sums: the caller divides by global counts.

`loss_sum` weighs each token by `inputs.weights`. Metrics are plain means over the tokens with a weight above 0, given
as (numerator, denominator), so that they add up over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import KlKind, kl
from megatron_rl.types import LossInputs, LossOutput

if TYPE_CHECKING:
    from megatron_rl.config.schema import AlgorithmConfig
    from megatron_rl.protocols import PolicyLoss

_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PpoClip:
    """PPO's clipped objective with DAPO's separate bounds and a dual clip, plus a KL term.

    ratio = p / p_old; L1 = -A ratio; L2 = -A clip(ratio, 1 - clip_low, 1 + clip_high); L3 = -A clip_dual
    loss  = max(L1, L2)              where A >= 0     (Schulman et al. 2017, arXiv 1707.06347)
            min(max(L1, L2), L3)     where A <  0     (Ye et al. 2020, arXiv 1912.09729)
            + kl_coef KL(p || p_ref)
    """

    clip_low: float = 0.2
    clip_high: float = 0.3
    clip_dual: float = 3.0
    kl_coef: float = 0.0
    kl_kind: KlKind = "k3"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantages = inputs.advantages
        log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        clipped_log_ratio = log_ratio.clamp(math.log(1 - self.clip_low), math.log(1 + self.clip_high))
        unclipped, clipped = -advantages * log_ratio.exp(), -advantages * clipped_log_ratio.exp()
        upper = torch.maximum(unclipped, clipped)
        dual = -advantages * self.clip_dual
        token_loss = torch.where(advantages < 0, torch.minimum(upper, dual), upper)

        metrics = {
            "actor/pg_loss": token_loss,
            "actor/pg_clipfrac_higher": unclipped < clipped,
            "actor/pg_clipfrac_lower": (upper > dual) & (advantages < 0),
            "actor/ppo_kl": -log_ratio,
            "actor/entropy_loss": -inputs.logprobs,
            **_rollout_gap(inputs),
        }
        if inputs.ref_logprobs is not None:
            token_kl = kl(inputs.logprobs, inputs.ref_logprobs, self.kl_kind)
            metrics["actor/kl_loss"] = token_kl
            token_loss = token_loss + self.kl_coef * token_kl
        assert inputs.ref_logprobs is not None or self.kl_coef == 0, "a KL term needs reference log-probabilities"
        return LossOutput((token_loss * inputs.weights).sum(), _sums(metrics, inputs.weights))


@dataclass(frozen=True)
class NllLoss:
    """Supervised fine-tuning: -log p of the reference answer's tokens."""

    def __call__(self, inputs: LossInputs) -> LossOutput:
        token_loss = -inputs.logprobs
        return LossOutput((token_loss * inputs.weights).sum(), _sums({"sft/nll": token_loss}, inputs.weights))


def _ppo_clip(settings: AlgorithmConfig) -> PolicyLoss:
    return PpoClip(settings.clip_low, settings.clip_high, settings.clip_dual, settings.kl_coef, settings.kl_kind)


LOSSES: dict[str, Callable[[AlgorithmConfig], PolicyLoss]] = {"ppo_clip": _ppo_clip}
"""By `algorithm.loss`. Each reads its own settings."""


def _rollout_gap(inputs: LossInputs) -> dict[str, Tensor]:
    """How far the trainer's log-probabilities of the sampled tokens are from those the rollout engine reported."""
    gap = (inputs.old_logprobs - inputs.rollout_logprobs).abs()
    return {"rollout/logprob_gap_mean": gap, "rollout/token_mult_prob_error": gap.exp()}


@torch.no_grad()
def _sums(values: dict[str, Tensor], weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    active = weights > 0
    count = active.sum().float()
    return {name: (value.detach().float()[active].sum(), count) for name, value in values.items()}
