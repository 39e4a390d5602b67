# SPDX-License-Identifier: Apache-2.0
"""Whether a batch would be learned from faster with fewer context parallel ranks. A prediction, from lengths alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.training.packing import Bundle, plan_packing
from model_providers.shape import TransformerShape

FLOPS_PER_BYTE = 2000.0
"""Work that a device does in the time in which it receives a byte: about 400 TFLOP/s in bf16 beside 200 GB/s."""
WORTH_SAYING = 0.95  # part of the present time below which a smaller size is advised
TRAINING_PASSES = 3.0  # forward and the two gradients, in units of the forward


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one update with `context` ranks: work and received bytes, both in FLOPs of one layer, of the busiest rank."""

    context: int
    max_tokens: int
    work: float
    communication: float

    @property
    def time(self) -> float:
        return self.work + self.communication


def predict(
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, num_data: int, max_tokens: int
) -> Prediction:
    """The same devices and the same tokens a rank, with `context` of them to a micro-batch of `max_tokens`."""
    cost = {bundle.members: bundle for bundle in bundles}
    plan = plan_packing(bundles, num_data, max_tokens)
    ranks = [[cost[members] for bin in rank for members in bin] for rank in plan.bins]
    most = max(ranks, key=lambda rank: sum(bundle.cost for bundle in rank))
    work = sum(bundle.cost for bundle in most) / context * 24 * shape.hidden_size**2 * TRAINING_PASSES
    row_bytes = 2 * 2 * shape.num_groups * shape.head_dim  # key and value, bf16
    rows = sum(bundle.num_tokens for bundle in most) * (context - 1) / context
    num_transfers = 4  # keys and values in forward and backward, and their gradients in fp32
    return Prediction(context, max_tokens, work, rows * row_bytes * num_transfers * FLOPS_PER_BYTE)


class SmallerContext(UserWarning):
    """Fewer context parallel ranks are predicted to be faster."""


_SAID: set[int] = set()  # sizes that have been warned of


def warn_once(bundles: Sequence[Bundle], shape: TransformerShape, context: int, num_data: int, max_tokens: int) -> None:
    """Give the advice for the first batch that calls for it; every batch would repeat it with other figures."""
    if context not in _SAID and (text := advise(bundles, shape, context, num_data, max_tokens)):
        _SAID.add(context)
        warnings.warn(text, SmallerContext, stacklevel=2)


def advise(
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, num_data: int, max_tokens: int
) -> str | None:
    """A warning when fewer ranks to a micro-batch, each with as many tokens as now, would take less time."""
    if context == 1 or not bundles:
        return None
    now = predict(bundles, shape, context, num_data, max_tokens)
    choices = _smaller(bundles, shape, context, num_data, max_tokens)
    best = min(choices, key=lambda p: p.time, default=now)
    if best.time >= WORTH_SAYING * now.time:
        return None
    longest = max(bundle.num_tokens for bundle in bundles)
    return (
        f"parallel.context={context}: the longest of this batch has {longest} tokens, and receiving keys and values is "
        f"{now.communication / now.time:.0%} of the predicted time; parallel.context={best.context} with "
        f"train.max_tokens_per_microbatch={best.max_tokens} (as many a rank) is predicted to take "
        f"{best.time / now.time:.2f} of it"
    )


def _smaller(
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, num_data: int, max_tokens: int
) -> Iterator[Prediction]:
    """Predictions for the divisors of `context` with which the longest sequence still fits."""
    longest = max(bundle.num_tokens for bundle in bundles)
    for fewer in range(1, context):
        budget = max_tokens * fewer // context
        if context % fewer == 0 and longest <= budget:
            yield predict(bundles, shape, fewer, num_data * context // fewer, budget)
