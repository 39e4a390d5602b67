# SPDX-License-Identifier: Apache-2.0
"""The main job on one GPU: two steps of the quick start through the launcher, with NVDEC, NCCL and vLLM on CUDA."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU here"),
]


def test_two_steps_of_the_quick_start(tmp_path: Path) -> None:
    from scripts.make_tiny_checkpoint import write_checkpoint
    from scripts.make_videos import make_dataset

    write_checkpoint(tmp_path / "tiny", seed=0)
    make_dataset(tmp_path / "videos", num_train=32, num_eval=8, seed=0)
    overrides = {
        "run_dir": tmp_path / "run",
        "model.hf": tmp_path / "tiny",
        "data.train": tmp_path / "videos/train.jsonl",
        "data.eval": tmp_path / "videos/eval.jsonl",
        "parallel.tensor": 1,
        "rollout.tensor": 1,
        "rollout.kv_cache_gib": 1,
        "train.num_steps": 2,
        "log.wandb": "off",
    }
    command = ["bash", "scripts/launch.sh", "--nproc", "1", "megatron_rl.train", "scripts/recipes/quickstart.yaml"]
    subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], cwd=ROOT, check=True)

    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2 and all(json.loads(line) for line in metrics)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_steps"] == 2 and 0.0 <= summary["heldout_accuracy"] <= 1.0
