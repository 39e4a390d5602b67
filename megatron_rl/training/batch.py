# SPDX-License-Identifier: Apache-2.0
"""Scored groups -> train samples with advantages -> packed micro-batches of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_rl.protocols import AdvantageEstimator, ModelProvider
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.context_advice import warn_once
from megatron_rl.training.microbatch import MicroBatch, RankSlice, build_microbatch
from megatron_rl.training.packing import attention_weight, make_bundles, plan_packing
from megatron_rl.types import Group, TrainSample


def make_samples(
    groups: Sequence[Group],
    estimate: AdvantageEstimator,
    truncated: str,
) -> list[list[TrainSample]]:
    """One list of samples per group. `truncated`="mask" leaves truncated responses out of the loss (not of the
    baseline)."""
    result = []
    for group in groups:
        prompt, scored = group.prompt, group.scored
        advantages = estimate([s.reward for s in scored])
        result.append(
            [
                TrainSample(prompt, s.completion.token_ids, advantage, s.completion.logprobs)
                for s, advantage in zip(scored, advantages, strict=True)
                if not (truncated == "mask" and s.completion.truncated)
            ]
        )
    return result


def weigh(samples: list[TrainSample], loss_average: str) -> list[TrainSample]:
    """token: all weights 1. sequence: weights under which the mean over tokens is the mean of the sequences' means."""
    if loss_average == "token":
        return samples
    mean_length = sum(len(s.response_ids) for s in samples) / max(1, len(samples))
    return [replace(s, weight=mean_length / len(s.response_ids)) for s in samples]


def pack(
    groups: Sequence[Sequence[TrainSample]],
    num_updates: int,
    max_tokens: int,
    provider: ModelProvider,
    mesh: ParallelMesh,
    loss_average: str = "token",
    share_prefix: bool = True,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches, one list per optimizer update; the same number on every data parallel rank.

    With `share_prefix` the prompt of a group is stored and computed once for all its responses. An update for which no
    sample is left is not made: it would only apply momentum and weight decay.
    """
    hidden_size = provider.shape.hidden_size
    cut = RankSlice(
        rank=mesh.here.cp,
        num_ranks=mesh.context,
        pad_multiple=mesh.tensor,
        slice_rank=mesh.here.tp,
        num_slices=mesh.tensor,
        attention_weight=attention_weight(hidden_size),
        by_heads=mesh.context_comm == "a2a",
    )
    updates = []
    for index in range(num_updates):
        samples = weigh([s for group in _share(groups, index, num_updates) for s in group], loss_average)
        if not samples:
            continue
        bundles = make_bundles(samples, max_tokens, hidden_size, share_prefix)
        multiple = mesh.pipeline if mesh.virtual > 1 else 1
        plan = plan_packing(bundles, mesh.data, max_tokens, multiple)
        if mesh.rank == 0:
            warn_once(bundles, provider.shape, mesh.context, mesh.context_comm, mesh.data, max_tokens)
        updates.append(
            [build_microbatch(samples, members, cut, provider.position_ids) for members in plan.bins[mesh.here.dp]]
        )
    return updates


def _share(groups: Sequence[Any], index: int, num_shares: int) -> Sequence[Any]:
    return groups[len(groups) * index // num_shares : len(groups) * (index + 1) // num_shares]
