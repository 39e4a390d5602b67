# SPDX-License-Identifier: Apache-2.0
"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens (Schulman 2020).

With d = log p_ref - log p:  k1 = -d,  abs = |d|,  k2 = d^2 / 2,  k3 = exp(d) - d - 1.
As a loss, k1 has a gradient of zero mean; k3 is the usual choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["k1", "abs", "k2", "k3"]

_LONGEST_STEP = 20.0  # keeps exp() finite where the two models disagree completely
_LARGEST_K3 = 10.0


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """[R] -> [R] in fp32."""
    difference = ref_logprobs.float() - logprobs.float()
    if kind == "k1":
        return -difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return difference.square() / 2
    assert kind == "k3", kind
    difference = difference.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    return (torch.expm1(difference) - difference).clamp(-_LARGEST_K3, _LARGEST_K3)
