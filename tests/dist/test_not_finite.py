# SPDX-License-Identifier: Apache-2.0
"""A gradient that is not finite stops the run before it reaches the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.losses import PpoClip
from tests.tiny_policy import join, mixed_samples, open_trainer, random_embeds, snapshot, unscored
from tests.world import run_world


def _update_on_nan(rank: int, folder: Path) -> Any:
    trainer = open_trainer(folder, join(tensor=2))
    samples = mixed_samples(trainer.provider)
    samples[0] = replace(samples[0], advantage=float("nan"))
    before = snapshot(trainer.policy)
    batches = trainer.pack(samples)
    with pytest.raises(RuntimeError, match="NaN|nan"):
        trainer.policy.train(unscored(batches), random_embeds(samples), PpoClip(), step=0)
    return all(torch.equal(before[name], tensor) for name, tensor in snapshot(trainer.policy).items())


def test_nan_gradient_is_refused(tiny_checkpoint: Path) -> None:
    assert run_world(2, _update_on_nan, tiny_checkpoint) == [True, True]
