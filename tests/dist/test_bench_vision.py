# SPDX-License-Identifier: Apache-2.0
"""The vision benchmark on few frames: its counts against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PATCHES, TOKENS = 64, 16  # of two frames of 112 x 112
HIDDEN_BYTES = 256 * 4


@pytest.mark.full
def test_figures_of_few_frames(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    size = ["--video-frames", "24", "--frames", "8", "--repeat", "1", "--responses", "3", "--side", "112"]
    script = str(ROOT / "scripts" / "bench" / "vision.py")
    done = subprocess.run(
        [sys.executable, script, "--json", str(out), *size], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    for encoding, world in zip(record["encoding"], (1, 2, 4), strict=True):
        ranks = encoding["ranks"]
        assert [r["encoded_patches"] for r in ranks] == [12 * PATCHES // world] * world
        assert sum(r["tokens"] for r in ranks) == 12 * TOKENS, "every token has one owner"
        lacking = 12 * TOKENS * (world - 1) // world * HIDDEN_BYTES
        assert [r["bytes_of_whole_video"] for r in ranks] == [lacking] * world
        assert all(r["bytes_to_owner"] <= r["tokens"] * HIDDEN_BYTES for r in ranks)
    [step] = record["steps"]
    one_video, prompts, passes = 4 * PATCHES, 2, 3
    assert step["encoded_patches"] == {
        "every_pass": prompts * one_video * (1 + passes * 3),
        **dict.fromkeys(("reused", "reused_cp", "ours", "ours_cp"), prompts * one_video),
    }
    assert step["over_every_pass"]["every_pass"] == 1.0 and 0 < step["best_of_ours"]
    assert step["long_rl_best"]["Qwen2.5-VL-7B"] == pytest.approx(30 / 119)
