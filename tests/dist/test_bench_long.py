# SPDX-License-Identifier: Apache-2.0
"""The benchmark of long sequences: its formula by hand, its ratios, and a run in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model_providers.qwen3.tiny import tiny
from model_providers.qwen3.weights import shape_of

ROOT = Path(__file__).parents[2]


def test_flops_by_hand() -> None:
    from scripts.bench.long import LongSetting, flops_of, train_flops

    shape = shape_of({"model_type": "qwen2", **tiny(272)})
    projection, rest = 128 * 128 + 2 * 128 * 64, 128 * 128 + 3 * 128 * 256  # q, k and v; output, gate and up and down
    assert train_flops(shape, 1, 0, 0, 0) == 6 * (2 * projection + rest)  # of the last layer, keys and values
    assert train_flops(shape, 0, 1, 0, 0) == train_flops(shape, 0, 0, 0, 1) == 14 * 128
    assert train_flops(shape, 0, 0, 1, 0) == 8 * 128 * 272 + 6 * rest
    setting = LongSetting(prompt=100, response=10, num_samples=4, long_prompt=0, ranks=1, repeat=1)
    assert flops_of(shape, setting, share=False) == train_flops(shape, 440, 4 * 6050, 40, 4 * 1050)
    assert flops_of(shape, setting, share=True) == train_flops(shape, 140, 5000 + 4 * 1050, 40, 4 * 1050)


@pytest.mark.full
def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    sizes = ["--prompt", "300", "--response", "16", "--num-samples", "4", "--long-prompt", "400", "--ranks", "2"]
    command = [sys.executable, "scripts/bench/long.py", "--json", str(out), "--repeat", "1", *sizes]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    prefix, context = record["prefix"], record["context"]
    assert prefix["loss_difference"] <= 1e-5 and prefix["memory_ratio"] > 2
    assert 3 < prefix["flops_ratio"] < 4
    assert set(context["variants"]) == {"all_gather", "p2p", "a2a"}
    for figures in context["variants"].values():
        assert figures["loss_difference"] <= 1e-5 and figures["received_bytes"] > 0
        assert figures["memory_ratio"] == pytest.approx(0.5, abs=0.1)
    assert f"P={300} R={16} N={4}" in run.stdout
