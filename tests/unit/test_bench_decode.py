# SPDX-License-Identifier: Apache-2.0
"""The decoding benchmark runs, and all that it compares give the same frames. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.video.index_store import index_video

REPO = Path(__file__).parents[2]


@pytest.mark.full
def test_every_method_gives_the_frames_that_ours_gives(tmp_path):
    out = tmp_path / "decode.json"
    options = "--seconds 4 --sizes 64x48 --kinds h264_g30,vp9_g250 --frames 8,fps2 --threads 1,2 --rounds 2".split()
    done = subprocess.run(
        [sys.executable, "scripts/bench/decode.py", "--json", str(out), "--videos", str(tmp_path), *options],
        cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert {r["method"] for r in results} >= {"ours", "ours indexed", "limit", "pyav seek", "pyav sequential", "opencv"}
    assert {(r["frames"], r["threads"], r["resized"]) for r in results} == {
        (frames, threads, resized) for frames in ("8", "fps2") for threads in (1, 2) for resized in (False, True)
    }
    index = index_video(str(tmp_path / "h264_g30_64x48_4s.mp4"))
    assert index.num_frames == 120 and np.flatnonzero(index.is_key).tolist() == [0, 30, 60, 90]
    assert index.is_droppable.mean() > 0.3
    assert index_video(str(tmp_path / "vp9_g250_64x48_4s.webm")).is_key.sum() == 1
    exact = [r for r in results if r["method"] in ("pyav seek", "pyav sequential", "opencv")]
    assert all(r["error"] == 0.0 for r in exact), exact
    assert all(r["error"] < 8 for r in results if r["method"] == "dali reader"), "another colour conversion"
    assert "peer/ours" in done.stdout and "resized to 224x308" in done.stdout
