# SPDX-License-Identifier: Apache-2.0
"""Learning from sampled tokens: pack, score, advantage per token, correction, loss, update. Also learning from answers
that are given (supervised fine-tuning), by the same path.

Every method is collective. A step works on one global batch: all ranks know all groups, each holds its micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.step_metrics import MismatchMetric, Totals
from megatron_rl.protocols import AdvantageEstimator, ModelProvider, PolicyLoss, StepEncoder
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.batch import Update, advantage_inputs, build_samples, pack
from megatron_rl.training.context_advice import SmallerContext, advise
from megatron_rl.training.microbatch import localize
from megatron_rl.training.packing import build_bundles
from megatron_rl.training.policy import Policy, Reference
from megatron_rl.types import Group, TrainSample


@dataclass(frozen=True, slots=True)
class PackingSettings:
    """How a step's samples become updates and micro-batches: the keys of `train` in a recipe."""

    updates_per_step: int
    max_tokens: int
    share_prefix: bool
    loss_average: str = "token"


@dataclass(frozen=True, slots=True)
class Objective:
    """What is learned from a group: estimator, loss (with its correction, if there is one), and whether truncated
    responses stay."""

    estimator: AdvantageEstimator
    loss: PolicyLoss
    truncated: str = "keep"


class TokenLearner:
    """The learner of language models (protocol Learner). `reference` scores with the weights of the start, if there is
    one. Without an `objective` it learns from answers only."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        encoder: StepEncoder,
        provider: ModelProvider,
        mesh: ParallelMesh,
        packing: PackingSettings,
        objective: Objective | None,
        progress: Progress,
    ):
        self.policy = policy
        self._reference, self._encoder, self._provider, self._mesh = reference, encoder, provider, mesh
        self._packing, self._objective, self._progress = packing, objective, progress
        self._advised = False

    @property
    def version(self) -> int:
        return self.policy.version

    def offloaded(self) -> AbstractContextManager[None]:
        return self.policy.offloaded()

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """`updates_per_step` optimizer updates from one rollout batch. Returns the metrics of all ranks together."""
        objective = self._objective
        assert objective is not None, "a learner of answers has no objective for groups"
        updates = self._pack(build_samples(groups, objective.truncated))
        updates = self._score(updates, step)
        advantages = objective.estimator(advantage_inputs(groups))
        updates = [update.with_advantages(advantages) for update in updates]
        mismatch = MismatchMetric(objective.loss)
        return self._train(updates, mismatch, step) | mismatch.metrics() | self._skipped(updates)

    def learn_answers(self, samples: Sequence[TrainSample], step: int) -> dict[str, float]:
        """Make the given responses likelier. Returns the metrics of all ranks together."""
        updates = self._pack([[sample] for sample in samples])
        counts = {"sft/num_samples": len(samples), "sft/num_tokens": sum(len(s.response_ids) for s in samples)}
        return self._train(updates, NllLoss(), step) | {name: float(count) for name, count in counts.items()}

    def _pack(self, samples: Sequence[Sequence[TrainSample]]) -> list[Update]:
        """The updates of a step, with the embeddings of this rank's media tokens.

        Nothing is fetched after that in the step: the embeddings that this rank made for others are dropped.
        """
        settings = self._packing
        updates = pack(
            samples,
            settings.updates_per_step,
            settings.max_tokens,
            self._provider,
            self._mesh,
            settings.loss_average,
            settings.share_prefix,
        )
        self._advise(updates)
        fetched = [fetch_embeds(update, self._encoder, asks=self._mesh.is_first_stage) for update in updates]
        self._encoder.release()
        return fetched

    def _score(self, updates: list[Update], step: int) -> list[Update]:
        """Old log-probabilities where there are several updates (a single one starts at the weights that sampled: its
        own are the old ones), and the reference's if there is one."""
        if len(updates) > 1:
            with self._progress.phase(step, "old"):
                updates = [u.with_old(self.policy.logprobs(u.batches, u.embeds.tables)) for u in updates]
        if self._reference is not None:
            with self._progress.phase(step, "ref"), self._reference.swapped_in():
                updates = [
                    u.with_reference(self.policy.logprobs(u.batches, self._encoder.refreshed(u.embeds).tables))
                    for u in updates
                ]
        return updates

    def _train(self, updates: Sequence[Update], loss: PolicyLoss, step: int) -> dict[str, float]:
        totals = Totals()
        with self._progress.phase(step, "update_actor"):
            for update in updates:
                now = self._encoder.refreshed(update.embeds)
                backward = partial(self._encoder.backward, now)
                totals.add(self.policy.train(update.scored, now.tables, loss, step, backward))
        return totals.reduced()

    def _skipped(self, updates: Sequence[Update]) -> dict[str, float]:
        return {"actor/skipped_updates": float(self._packing.updates_per_step - len(updates))}

    def _advise(self, updates: Sequence[Update]) -> None:
        """Once, for the first batch: whether fewer context parallel ranks would be faster."""
        if self._advised or self._mesh.rank != 0 or not updates:
            return
        self._advised = True
        shape, settings, mesh = self._provider.shape, self._packing, self._mesh
        bundles = build_bundles(updates[0].samples, settings.max_tokens, shape.hidden_size, settings.share_prefix)
        advice = advise(bundles, shape, mesh.trainer.context, mesh.context_comm, mesh.trainer.data, settings.max_tokens)
        if advice is not None:
            warnings.warn(advice, SmallerContext, stacklevel=2)


def fetch_embeds(update: Update, encoder: StepEncoder, asks: bool) -> Update:
    """The update with the embeddings of the media tokens that this rank puts into its micro-batches; only ranks of the
    first pipeline stage ask for any. Collective."""
    batches, wanted = localize(update.batches)
    return Update(update.samples, update.with_batches(batches).scored, encoder.fetch_tokens(wanted if asks else {}))
