# SPDX-License-Identifier: Apache-2.0
"""Whether a batch would be learned from faster with fewer context parallel ranks. A prediction, from lengths alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.training.packing import Bundle, attention_weight, plan_packing
from model_providers.attention.segments import block_size, plan_attention, segments_of, shard
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
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, comm: str, num_data: int, max_tokens: int
) -> Prediction:
    """The same devices and the same tokens a rank, with `context` of them to a micro-batch of `max_tokens`."""
    by_members = {bundle.members: bundle for bundle in bundles}
    plan = plan_packing(bundles, num_data, max_tokens)
    ranks = [[[by_members[members] for members in bin] for bin in rank] for rank in plan.bins]
    busiest = max(ranks, key=lambda rank: sum(bundle.cost for bin in rank for bundle in bin))
    cost = sum(bundle.cost for bin in busiest for bundle in bin)
    work = cost / context * 24 * shape.hidden_size**2 * TRAINING_PASSES
    received = sum(_received_bytes(bin, shape, context, comm) for bin in busiest)
    return Prediction(context, max_tokens, work, received * FLOPS_PER_BYTE)


def _received_bytes(bundles: Sequence[Bundle], shape: TransformerShape, context: int, comm: str) -> float:
    """Bytes in bf16 that a rank receives for one layer, there and back, as the trainer's own split gives."""
    if comm == "a2a":  # all heads of its rows out and in, in the forward and in the backward
        rows = sum(bundle.num_tokens for bundle in bundles) / context * (context - 1) / context
        return rows * 2 * (2 * shape.num_heads + 2 * shape.num_groups) * shape.head_dim * 2
    segments = segments_of([(bundle.prompt_length, bundle.response_lengths) for bundle in bundles])
    shards = shard(segments, context, attention_weight(shape.hidden_size))
    blocks = [block_size(exports) for exports in plan_attention(segments, shards, 0).exports]
    num_transfers = 4  # keys and values in the forward and in the backward, and their gradients in fp32
    return (sum(blocks) - min(blocks)) * 2 * shape.num_groups * shape.head_dim * 2 * num_transfers


class SmallerContext(UserWarning):
    """Fewer context parallel ranks are predicted to be faster."""


def advise(
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, comm: str, num_data: int, max_tokens: int
) -> str | None:
    """A warning when fewer ranks to a micro-batch, each with as many tokens as now, would take less time."""
    if context == 1 or not bundles:
        return None
    now = predict(bundles, shape, context, comm, num_data, max_tokens)
    choices = _smaller(bundles, shape, context, comm, num_data, max_tokens)
    best = min(choices, key=lambda p: p.time, default=now)
    if best.time >= WORTH_SAYING * now.time:
        return None
    longest = max(bundle.num_tokens for bundle in bundles)
    return (
        f"parallel.context={context}: the longest of this batch has {longest} tokens, and what other ranks send is "
        f"{now.communication / now.time:.0%} of the predicted time; parallel.context={best.context} with "
        f"train.max_tokens_per_microbatch={best.max_tokens} (as many a rank) is predicted to take "
        f"{best.time / now.time:.2f} of it"
    )


def _smaller(
    bundles: Sequence[Bundle], shape: TransformerShape, context: int, comm: str, num_data: int, max_tokens: int
) -> Iterator[Prediction]:
    """Predictions for the divisors of `context` with which the longest sequence still fits."""
    longest = max(bundle.num_tokens for bundle in bundles)
    for fewer in range(1, context):
        budget = max_tokens * fewer // context
        if context % fewer == 0 and longest <= budget:
            yield predict(bundles, shape, fewer, comm, num_data * context // fewer, budget)
