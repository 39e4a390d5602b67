# SPDX-License-Identifier: Apache-2.0
"""A gradient that is not finite stops the run before it reaches the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.training.batch import ScoredBatch
from tests.tiny_policy import join, mixed_samples, open_trainer, random_embeds, snapshot
from tests.world import run_world


def _update_on_nan(rank: int, folder: Path) -> Any:
    trainer = open_trainer(folder, join(tensor=2))
    samples = mixed_samples(trainer.provider)
    before = snapshot(trainer.policy)
    nan = torch.tensor(float("nan"))
    not_a_number = [ScoredBatch(b, advantages=nan.expand(b.num_response_tokens)) for b in trainer.pack(samples)]
    with pytest.raises(RuntimeError, match="NaN|nan"):
        trainer.policy.train(not_a_number, random_embeds(samples), PpoClip(), step=0)
    return all(torch.equal(before[name], tensor) for name, tensor in snapshot(trainer.policy).items())


def test_nan_gradient_is_refused(tiny_checkpoint: Path) -> None:
    assert run_world(2, _update_on_nan, tiny_checkpoint) == [True, True]
