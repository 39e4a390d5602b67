# SPDX-License-Identifier: Apache-2.0
"""The jobs with a trained tower: trainer and engine see the same embeddings in every step, and resume goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.config.schema import AlgorithmConfig, CheckpointConfig, EvalConfig, JobConfig, ModelConfig, SftConfig
from megatron_rl.observe.metric_log import METRICS_FILE, read_metrics
from model_providers.hf_checkpoint import HfCheckpoint
from tests.dist.test_jobs import rl_config, train
from tests.rollout_parts import as_sft, small_config
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")


def _sft_config(checkpoint: Path, videos: Path, run_dir: Path) -> SftConfig:
    """The projector in front of a frozen language model."""
    cfg = as_sft(small_config(checkpoint, run_dir, tensor=2))
    return replace(
        cfg,
        model=ModelConfig(
            hf=str(checkpoint), dtype="float32", freeze_vision=False, train_vision="projector", freeze=("*",)
        ),
        data=replace(cfg.data, train=str(videos / "train.jsonl")),
        train=replace(cfg.train, prompts_per_step=4, num_steps=4, optimizer=replace(cfg.train.optimizer, lr=1e-2)),
        checkpoint=CheckpointConfig(export_hf=True, keep=1),
    )


def _sft(rank: int, cfg: SftConfig) -> None:
    from megatron_rl.sft import run

    run(cfg)


def _metric(cfg: JobConfig, name: str) -> list[float]:
    return [row[name] for row in read_metrics(Path(cfg.run_dir) / METRICS_FILE)]


def _exported(cfg: JobConfig) -> dict[str, Tensor]:
    folder = HfCheckpoint(Path(cfg.run_dir) / "hf")
    return {name: folder.tensor(name) for name in folder.names()}


def test_sft_of_the_projector_alone(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path) -> None:
    whole = _sft_config(tiny_checkpoint, tiny_videos, tmp_path / "whole")
    parts = replace(whole, run_dir=str(tmp_path / "parts"))
    run_world(2, _sft, whole)
    run_world(2, _sft, replace(parts, train=replace(parts.train, num_steps=2)))
    run_world(2, _sft, parts)
    losses = _metric(whole, "sft/nll")
    assert losses[-1] < losses[0] and _metric(parts, "sft/nll") == losses
    assert all(n > 0 for n in _metric(whole, "vision/backward_patches"))
    before, after, resumed = HfCheckpoint(tiny_checkpoint), _exported(whole), _exported(parts)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before.tensor(name))}
    assert changed == {name for name in after if name.startswith("visual.merger.")}
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())


@pytest.mark.full
def test_rl_of_everything(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path) -> None:
    """Two updates a step, a reference: three towers, and trainer and engine agree on the present one."""
    cfg = rl_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    cfg = replace(
        cfg,
        model=replace(cfg.model, freeze_vision=False),
        train=replace(cfg.train, num_steps=3, updates_per_step=2),
        algorithm=AlgorithmConfig(kl_coef=0.1),
        eval=EvalConfig(at_start=False, at_end=False),
        checkpoint=replace(cfg.checkpoint, export_hf=True),
    )
    run_world(2, train, cfg, timeout=600)
    assert max(_metric(cfg, "rollout/logprob_gap_max")) < 1e-4
    kl = _metric(cfg, "actor/kl_loss")
    assert kl[0] < kl[-1]
    before, after = HfCheckpoint(tiny_checkpoint), _exported(cfg)
    assert all(not torch.equal(t, before.tensor(n)) for n, t in after.items() if n.startswith("visual.blocks."))
