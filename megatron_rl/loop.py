# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning, a step on one page: sample groups of responses with the newest weights, learn from them.

What a step does in detail is said by the parts that are given to it:

    source    rollout/colocated.py    weight sync, encoding, generation, rewards, dynamic sampling (arXiv 2503.14476)
              rollout/replayed.py     the same groups from the files of an earlier run
    learner   training/token_learner.py    pack, score, advantage per token, correction, loss, update

Every function here is collective.
"""

from __future__ import annotations

from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.observe.step_metrics import rollout_metrics
from megatron_rl.protocols import GroupSource, Learner
from megatron_rl.types import RolloutBatch

Metrics = dict[str, float]


def rl_step(source: GroupSource, learner: Learner, quarantine: Quarantine, step: int) -> Metrics:
    """Sample groups with the newest weights, learn from them. Returns the metrics of the step."""
    batch, metrics = sample_step(source, quarantine, step)
    return metrics | learner.learn(batch.kept, step)


def sample_step(source: GroupSource, quarantine: Quarantine, step: int) -> tuple[RolloutBatch, Metrics]:
    """Sample groups and learn nothing: the first half of a step."""
    batch = source.next_batch(step)
    return batch, rollout_metrics(batch) | quarantine.metrics()
