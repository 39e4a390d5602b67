# SPDX-License-Identifier: Apache-2.0
"""Weights of the loss, and updates for which nothing is left."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.batch import advantage_inputs, build_samples, pack
from megatron_rl.types import AdvantageInputs, Advantages, Completion, Group, Prompt, Row, Scored, TrainSample
from model_providers.positions import text_positions

MESH = ParallelMesh(rank=0, trainer=Grid(1), engine=Grid(1))
PROVIDER = SimpleNamespace(
    shape=SimpleNamespace(hidden_size=64),
    position_ids=text_positions,
)
PROMPT = Prompt(0, Row("rows.jsonl:1", "question", "answer"), (1, 2, 3), ())


def sample(length: int) -> TrainSample:
    return TrainSample(PROMPT, (5,) * length, (-1.0,) * length)


def loss_of_ones(batches: list) -> float:
    """The update's loss when every token's loss is 1: weighted sum over token count."""
    return sum(float(b.weights.sum()) for b in batches) / sum(b.num_response_tokens for b in batches)


def test_sequence_average_is_the_mean_of_means_in_every_update():
    groups = [[sample(10)], [sample(30)], [sample(100)], [sample(300)]]
    updates = pack(groups, 2, 4096, PROVIDER, MESH, loss_average="sequence")
    assert [round(loss_of_ones(update.batches), 6) for update in updates] == [1.0, 1.0]
    weights = {len(s): round(float(s[0]), 6) for s in updates[0].batches[0].weights.split([10, 30])}
    assert weights == {10: 2.0, 30: 0.666667}  # mean length 20: both sequences count the same


def test_token_average_weighs_every_token_the_same():
    (update,) = pack([[sample(10)], [sample(30)]], 1, 4096, PROVIDER, MESH)
    assert {float(w) for b in update.batches for w in b.weights} == {1.0}


def test_an_update_without_samples_is_not_made():
    assert [len(u.batches) for u in pack([[], [sample(4)]], 2, 4096, PROVIDER, MESH)] == [1]
    assert pack([], 3, 4096, PROVIDER, MESH) == []


def scored(index: int, length: int, reward: float, truncated: bool = False) -> Scored:
    return Scored(Completion(0, index, (5,) * length, (-1.0,) * length, "", truncated), reward, {})


def test_masked_truncation_keeps_the_baseline():
    group = Group(PROMPT, (scored(0, 1, 0.0, truncated=True), scored(1, 1, 2.0)))
    assert advantage_inputs([group]).rewards == ((0.0, 2.0),)  # of both: the mean is 1
    assert [[s.place for s in g] for g in build_samples([group], "mask")] == [[(0, 1)]]
    assert [[s.place for s in g] for g in build_samples([group], "keep")] == [[(0, 0), (0, 1)]]


def per_token(inputs: AdvantageInputs) -> Advantages:
    """Recognisable: group, response and token as one number."""
    numbered = (
        tuple(torch.arange(n) + 100.0 * i + 1000.0 * p for i, n in enumerate(lengths))
        for p, lengths in enumerate(inputs.num_tokens)
    )
    return Advantages(tuple(numbered))


@pytest.mark.parametrize("context", [1, 3])
def test_every_token_gets_its_own_advantage_wherever_it_is_computed(context):
    prompts = [replace(PROMPT, prompt_id=i) for i in range(2)]
    groups = [
        Group(prompts[0], (scored(0, 7, 1.0), scored(1, 3, 0.0, truncated=True), scored(2, 5, 0.0))),
        Group(prompts[1], (scored(0, 2, 1.0), scored(1, 9, 0.0))),
    ]
    advantages = per_token(advantage_inputs(groups))
    found = []
    for rank in range(context):
        mesh = ParallelMesh(rank, Grid(context, context=context), Grid(context))
        for update in pack(build_samples(groups, "mask"), 2, 4096, PROVIDER, mesh):
            for part in update.with_advantages(advantages).scored:
                found += part.advantages.tolist()
    expected = [*range(7), *range(200, 205), *range(1000, 1002), *range(1100, 1109)]
    assert sorted(found) == [float(value) for value in expected]
