# SPDX-License-Identifier: Apache-2.0
"""The policy between updates: on-policy ratios (I2), the reference's weights, offloaded state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import NllLoss, PpoClip
from megatron_rl.training import checkpoint
from megatron_rl.training.batch import ScoredBatch
from megatron_rl.training.policy import Hyperparameters, Reference
from megatron_rl.types import LossInputs, LossOutput
from tests import tiny_policy as tp
from tests.world import run_world

BUDGET = 64  # tokens: several micro-batches, packed and single


def _first_update(folder: Path, tensor: int, pipeline: int) -> Any:
    """(largest |new - old|, metric sums) of the first update after scoring, or None before the last stage."""
    trainer = tp.open_trainer(folder, tp.join(tensor, pipeline), temperature=0.7)
    samples = tp.mixed_samples(trainer.provider)
    batches, embeds = trainer.pack(samples, BUDGET), tp.random_embeds(samples)
    assert len(batches) > 1
    gaps: list[float] = []

    def loss(inputs: LossInputs) -> LossOutput:
        assert inputs.logprobs.requires_grad and not inputs.old_logprobs.requires_grad
        gaps.append(float((inputs.logprobs - inputs.old_logprobs).abs().max()))
        return PpoClip()(inputs)

    old = trainer.policy.logprobs(batches, embeds)
    scored = [ScoredBatch(b, o, None, tp.advantages_of(b.rollout_logprobs)) for b, o in zip(batches, old, strict=True)]
    metrics = trainer.policy.train(scored, embeds, loss, step=0)
    return (gaps, metrics) if trainer.mesh.is_last_stage and trainer.mesh.here.tp == 0 else None


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_first_update_is_on_policy_to_the_bit(tiny_checkpoint: Path, tensor: int, pipeline: int) -> None:
    ranks = run_world(tensor * pipeline, lambda _: _first_update(tiny_checkpoint, tensor, pipeline))
    (gaps, metrics) = next(r for r in ranks if r is not None)
    assert len(gaps) > 1 and set(gaps) == {0.0}
    for name in ("actor/ppo_kl", "actor/pg_clipfrac_higher", "actor/pg_clipfrac_lower"):
        assert metrics[name] == (0.0, 19.0), name
    assert metrics["actor/grad_norm"][0] > 0


def _swap_in_reference(folder: Path) -> None:
    """Everything on one rank of TP2: the reference scores as the start did, and the policy comes back unchanged."""
    trainer = tp.open_trainer(folder, tp.join(tensor=2))
    policy, samples = trainer.policy, tp.mixed_samples(trainer.provider)
    batches, embeds = trainer.pack(samples), tp.random_embeds(samples)
    reference = Reference(policy)
    at_start = policy.logprobs(batches, embeds)[0]
    policy.train(tp.unscored(batches), embeds, NllLoss(), step=0)
    trained = policy.logprobs(batches, embeds)[0]
    before = tp.snapshot(policy)
    assert (trained - at_start).abs().max() > 1e-3

    with reference.swapped_in():
        assert torch.equal(policy.logprobs(batches, embeds)[0], at_start)
    _assert_equal(tp.snapshot(policy), before)
    with pytest.raises(KeyError, match="deliberate"), reference.swapped_in():
        raise KeyError("deliberate")
    _assert_equal(tp.snapshot(policy), before)
    assert torch.equal(policy.logprobs(batches, embeds)[0], trained)


def test_reference_scores_as_the_start_did_and_the_policy_comes_back(tiny_checkpoint: Path) -> None:
    run_world(2, lambda _: _swap_in_reference(tiny_checkpoint))


def _assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def _two_updates(folder: Path, park: bool) -> dict[str, Tensor]:
    """State after two updates; between them, with `park`, gradients and optimizer state are away."""
    trainer = tp.open_trainer(folder, tp.join(tensor=1))
    policy, samples = trainer.policy, tp.mixed_samples(trainer.provider)
    scored, embeds = tp.unscored(trainer.pack(samples)), tp.random_embeds(samples)
    for step in range(2):
        if park:
            storages = [buffer.grad_data.untyped_storage() for chunk in policy.chunks for buffer in chunk.buffers]
            sizes = [s.nbytes() for s in storages]
            assert min(sizes) > 0
            weights = [p.detach().clone() for p in policy.language_model.parameters()]
            with policy.offloaded():
                assert [s.nbytes() for s in storages] == [0] * len(storages)
                now = policy.language_model.parameters()
                assert all(torch.equal(p, w) for p, w in zip(now, weights, strict=True))
            assert [s.nbytes() for s in storages] == sizes
        policy.train(scored, embeds, NllLoss(), step)
    return tp.snapshot(policy)


def test_parked_frees_the_gradients_and_changes_nothing(tiny_checkpoint: Path) -> None:
    offloaded = run_world(2, lambda _: _two_updates(tiny_checkpoint, park=True))
    straight = run_world(2, lambda _: _two_updates(tiny_checkpoint, park=False))
    for ours, expected in zip(offloaded, straight, strict=True):
        _assert_equal(ours, expected)


def _watched_updates(
    folder: Path, root: Path, hyper: Hyperparameters, offloaded: bool
) -> tuple[list[str], dict[str, Tensor]]:
    """What happens to the optimizer's state around two updates, a save and a load, and what it is after them."""
    trainer = tp.open_trainer(folder, tp.join(tensor=1), hyper)
    policy, samples, happened = trainer.policy, tp.mixed_samples(trainer.provider), []
    scored, embeds = tp.unscored(trainer.pack(samples)), tp.random_embeds(samples)

    def watch(owner: object, name: str, told: str) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            happened.append(told)
            return original(*args, **kwargs)

        setattr(owner, name, called)

    watch(policy.optimizer, "offload_to_cpu", "away")
    watch(policy.optimizer, "restore_from_cpu", "back")
    watch(policy.optimizer, "step", "step")
    watch(policy, "_forward_backward", "passes")
    if offloaded:
        with policy.offloaded():
            happened.append("engine")
    for step in range(2):
        policy.train(scored, embeds, NllLoss(), step)
    checkpoint.load(checkpoint.save(root, 2, policy, trainer.mesh, {}, str(folder)), policy, trainer.mesh)
    return happened, tp.snapshot(policy)


def test_optimizer_state_comes_back_for_its_step_and_for_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a CPU nothing has to move: host memory is where the state is. Counted is what Megatron-core is told."""

    def run(hyper: Hyperparameters, offloaded: bool) -> tuple[list[str], dict[str, Tensor]]:
        [result] = run_world(1, lambda _: _watched_updates(tiny_checkpoint, tmp_path, hyper, offloaded))
        return result

    update, offload = ["passes", "back", "step"], replace(tp.HYPER, offload=True)
    happened, expected = run(tp.HYPER, offloaded=True)
    assert happened == ["away", "engine", *update, *update, "back", "back"]
    happened, ours = run(offload, offloaded=True)
    assert happened == ["away", "engine", *update, "away", *update, "away", *["back", "away"] * 2]
    _assert_equal(ours, expected)
    happened, ours = run(offload, offloaded=False)
    assert happened == [*update, "away", *update, "away", *["back", "away"] * 2]
    _assert_equal(ours, expected)
