# SPDX-License-Identifier: Apache-2.0
"""Weights of the loss, and updates for which nothing is left."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.batch import make_samples, pack
from megatron_rl.types import Completion, Group, Prompt, Row, Scored, TrainSample
from model_providers.positions import text_positions

MESH = ParallelMesh(rank=0, world=1, tensor=1, pipeline=1, context=1, rollout_tensor=1)
PROVIDER = SimpleNamespace(
    shape=SimpleNamespace(hidden_size=64),
    position_ids=text_positions,
)
PROMPT = Prompt(0, Row("rows.jsonl:1", "question", "answer"), (1, 2, 3), ())


def sample(length: int) -> TrainSample:
    return TrainSample(PROMPT, (5,) * length, 1.0, (-1.0,) * length)


def loss_of_ones(batches: list) -> float:
    """The update's loss when every token's loss is 1: weighted sum over token count."""
    return sum(float(b.weights.sum()) for b in batches) / sum(b.num_response_tokens for b in batches)


def test_sequence_average_is_the_mean_of_means_in_every_update():
    groups = [[sample(10)], [sample(30)], [sample(100)], [sample(300)]]
    updates = pack(groups, 2, 4096, PROVIDER, MESH, loss_average="sequence")
    assert [round(loss_of_ones(batches), 6) for batches in updates] == [1.0, 1.0]
    weights = {len(s): round(float(s[0]), 6) for s in updates[0][0].weights.split([10, 30])}
    assert weights == {10: 2.0, 30: 0.666667}  # mean length 20: both sequences count the same


def test_token_average_weighs_every_token_the_same():
    (batches,) = pack([[sample(10)], [sample(30)]], 1, 4096, PROVIDER, MESH)
    assert {float(w) for b in batches for w in b.weights} == {1.0}


def test_an_update_without_samples_is_not_made():
    assert [len(u) for u in pack([[], [sample(4)]], 2, 4096, PROVIDER, MESH)] == [1]
    assert pack([], 3, 4096, PROVIDER, MESH) == []


def test_masked_truncation_keeps_the_baseline():
    cut, whole = (Completion(0, i, (1,), (-1.0,), "", truncated) for i, truncated in enumerate((True, False)))
    group = Group(PROMPT, (Scored(cut, 0.0, {}), Scored(whole, 2.0, {})))
    mean = [[s - 1.0 for s in (0.0, 2.0)]]
    kept = make_samples([group], lambda rewards: [r - sum(rewards) / 2 for r in rewards], "mask")
    assert [[s.advantage for s in g] for g in kept] == [mean[0][1:]]
    both = make_samples([group], lambda rewards: [r - sum(rewards) / 2 for r in rewards], "keep")
    assert [[s.advantage for s in g] for g in both] == mean
