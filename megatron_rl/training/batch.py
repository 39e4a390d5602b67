# SPDX-License-Identifier: Apache-2.0
"""Scored groups -> train samples -> packed micro-batches of this rank, by optimizer update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_rl.protocols import ModelProvider
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.microbatch import MicroBatch, RankSlice, build_microbatch
from megatron_rl.training.packing import attention_weight, build_bundles, plan_packing
from megatron_rl.types import AdvantageInputs, Advantages, Group, MediaEmbeds, TrainSample

NO_EMBEDS = MediaEmbeds({}, {}, 0)


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A micro-batch with what is known of its response tokens before the update, all fp32 [R].

    Log-probabilities exist on the last pipeline stage only. `old_logprobs` None: those that the update itself computes.
    `advantages` None: the loss has no use for them.
    """

    batch: MicroBatch
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer update learns from: the samples of all ranks, this rank's micro-batches of them, and the
    embeddings of the media tokens that stand in these."""

    samples: tuple[TrainSample, ...]
    scored: tuple[ScoredBatch, ...]
    embeds: MediaEmbeds = field(default=NO_EMBEDS)

    @property
    def batches(self) -> list[MicroBatch]:
        return [scored.batch for scored in self.scored]

    def with_batches(self, batches: Iterable[MicroBatch]) -> Update:
        pairs = zip(self.scored, batches, strict=True)
        return replace(self, scored=tuple(replace(scored, batch=batch) for scored, batch in pairs))

    def with_old(self, logprobs: Iterable[Tensor | None]) -> Update:
        """`logprobs`: [R] of each micro-batch, None except on the last pipeline stage."""
        pairs = zip(self.scored, logprobs, strict=True)
        return replace(self, scored=tuple(replace(scored, old_logprobs=values) for scored, values in pairs))

    def with_reference(self, logprobs: Iterable[Tensor | None]) -> Update:
        """As `with_old`, of the reference."""
        pairs = zip(self.scored, logprobs, strict=True)
        return replace(self, scored=tuple(replace(scored, ref_logprobs=values) for scored, values in pairs))

    def with_advantages(self, advantages: Advantages) -> Update:
        """Each micro-batch gets those of its own response tokens."""
        pairs = ((scored, _advantages_of(scored.batch, self.samples, advantages)) for scored in self.scored)
        return replace(self, scored=tuple(replace(scored, advantages=values) for scored, values in pairs))


def _advantages_of(batch: MicroBatch, samples: Sequence[TrainSample], advantages: Advantages) -> Tensor:
    """fp32 [R] of the response tokens of this rank."""
    places = (samples[index].place for index in batch.samples)
    whole = torch.cat([torch.zeros(0), *(advantages.tokens[group][response] for group, response in places)])
    return whole[batch.response_index]


def build_samples(groups: Sequence[Group], truncated: str) -> list[list[TrainSample]]:
    """One list of samples per group. `truncated`="mask" leaves truncated responses out of the loss."""
    return [
        [
            TrainSample(group.prompt, s.completion.token_ids, s.completion.logprobs, place=(number, index))
            for index, s in enumerate(group.scored)
            if not (truncated == "mask" and s.completion.truncated)
        ]
        for number, group in enumerate(groups)
    ]


def advantage_inputs(groups: Sequence[Group]) -> AdvantageInputs:
    """Of all responses: those that `build_samples` leaves out too."""
    return AdvantageInputs(
        rewards=tuple(tuple(s.reward for s in group.scored) for group in groups),
        num_tokens=tuple(tuple(len(s.completion.token_ids) for s in group.scored) for group in groups),
    )


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
) -> list[Update]:
    """This rank's micro-batches of every optimizer update; their number is the same on every data parallel rank.

    With `share_prefix` the prompt of a group is stored and computed once for all its responses. An update for which no
    sample is left is not made: it would only apply momentum and weight decay.
    """
    part = rank_slice(provider, mesh)
    updates = []
    for index in range(num_updates):
        samples = weigh([s for group in _share(groups, index, num_updates) for s in group], loss_average)
        if not samples:
            continue
        bundles = build_bundles(samples, max_tokens, provider.shape.hidden_size, share_prefix)
        multiple = mesh.trainer.pipeline if mesh.trainer.virtual > 1 else 1
        plan = plan_packing(bundles, mesh.trainer.data, max_tokens, multiple)
        batches = (
            build_microbatch(samples, members, part, provider.position_ids) for members in plan.bins[mesh.here.dp]
        )
        updates.append(Update(tuple(samples), tuple(ScoredBatch(batch) for batch in batches)))
    return updates


def rank_slice(provider: ModelProvider, mesh: ParallelMesh) -> RankSlice:
    """Which rows of a micro-batch this rank holds."""
    return RankSlice(
        rank=mesh.here.cp,
        num_ranks=mesh.trainer.context,
        pad_multiple=mesh.trainer.tensor,
        slice_rank=mesh.here.tp,
        num_slices=mesh.trainer.tensor,
        attention_weight=attention_weight(provider.shape.hidden_size),
        by_heads=mesh.context_comm == "a2a",
    )


def _share(groups: Sequence[Any], index: int, num_shares: int) -> Sequence[Any]:
    return groups[len(groups) * index // num_shares : len(groups) * (index + 1) // num_shares]
