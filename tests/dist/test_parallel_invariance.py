# SPDX-License-Identifier: Apache-2.0
"""I3, I2: where a sample is computed, and beside which others, changes neither loss nor gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.world import run_world

GRIDS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)]
TOLERANCE = 1e-5
ONE_BY_ONE = 60  # tokens of a micro-batch: the longest sample, so hardly two fit together


def _measure(folder: Path, tensor: int, pipeline: int, max_tokens: int = 4096, num_samples: int = 5, **options: Any):
    """(metric sums, gradient pieces) of one update with learning rate 0 on this rank."""
    from megatron_rl.algorithms.losses import PpoClip
    from tests import tiny_policy as tp

    mesh = tp.join(tensor, pipeline)
    trainer = tp.open_trainer(folder, mesh, tp.MEASURE, **options)
    samples = tp.mixed_samples(trainer.provider)[:num_samples]
    batches = tp.off_policy(trainer.pack(samples, max_tokens))
    metrics = trainer.policy.train(batches, tp.random_embeds(samples), PpoClip(kl_coef=0.1), step=0)
    return metrics, tp.gradients(trainer)


def _run(folder: Path, grid: tuple[int, int, int], **options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    from tests import tiny_policy as tp

    tensor, pipeline, data = grid
    ranks = run_world(tensor * pipeline * data, lambda _: _measure(folder, tensor, pipeline, **options))
    sums: dict[str, Tensor] = {}
    for metrics, _ in ranks:
        for name, pair in metrics.items():
            sums[name] = sums.get(name, torch.zeros(2)) + torch.tensor(pair)
    means = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    return means, tp.assemble(tp.open_provider(folder), [pieces for _, pieces in ranks])


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    return _run(tiny_checkpoint, (1, 1, 1))


def _assert_same(result: Any, truth: Any) -> None:
    from tests import tiny_policy as tp

    errors = tp.relative_errors(result[1], truth[1])
    assert max(errors.values()) <= TOLERANCE, errors
    assert result[0] == pytest.approx(truth[0], rel=TOLERANCE, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "tp{}_pp{}_dp{}".format(*g))
def test_grid(tiny_checkpoint: Path, truth: Any, grid: tuple[int, int, int]) -> None:
    _assert_same(_run(tiny_checkpoint, grid), truth)
