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
    for value in (float("nan"), float("inf"), 1e38):
        bad = torch.tensor(value)
        batches = [ScoredBatch(b, advantages=bad.expand(b.num_response_tokens)) for b in trainer.pack(samples)]
        with pytest.raises(
            ValueError, match=r"^train.optimizer.lr=\S+: step 4: gradient norm (nan|inf) is not finite; "
        ):
            trainer.policy.train(batches, random_embeds(samples), PpoClip(), step=3)
    return all(torch.equal(before[name], tensor) for name, tensor in snapshot(trainer.policy).items())


def test_nan_gradient_is_refused(tiny_checkpoint: Path) -> None:
    assert run_world(2, _update_on_nan, tiny_checkpoint) == [True, True]
