# SPDX-License-Identifier: Apache-2.0
"""Sixteen rollouts of a video take the host memory of one: frames and embeddings are never copied for a rollout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.schema import RlConfig
from megatron_rl.rl_session import build_engine
from megatron_rl.rollout.generate import generate
from megatron_rl.session import open_session
from megatron_rl.types import Completion, Prompt, Row, Sampling
from tests.host_memory import give_back_freed, map_large_blocks
from tests.rollout_parts import small_config
from tests.video_files import Kind, write_video
from tests.world import run_world

NUM_FRAMES, SIDE = 96, 224
FRAME_BYTES = NUM_FRAMES * 3 * SIDE * SIDE  # decoded and resized, of the one video
WORLD = 2


def _no_reward(prompts: list[Prompt], completions: list[Completion]) -> list[dict[str, float]]:
    return [{"overall": 0.0} for _ in completions]


def _most_resident() -> int:
    """Bytes, since the last `_forget_most`."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _forget_most() -> None:
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")


def _rollout_peaks(rank: int, cfg: RlConfig, video: str, counts: tuple[int, ...]) -> list[int]:
    """The most memory this rank held while it decoded, encoded and sampled, for each number of rollouts."""
    map_large_blocks()
    peaks = []
    with open_session(cfg, cfg.rollout.temperature) as session:
        engine, resharder = build_engine(cfg, session)
        resharder.sync(session.policy.version)
        engine.weights_changed(session.policy.version)
        for number, num_samples in enumerate(counts):
            session.encoder.forget()
            _forget_most()
            row = Row(f"made:{number}", "<video>What moves?", "", (video,))
            prompts = session.prompts.encoded([(number, row)], "the test")
            assert session.quarantine.total == 0
            sampling = Sampling(num_samples, cfg.rollout.temperature, 12, seed=1, step=number)
            [group] = generate(prompts, session.encoder, engine, _no_reward, sampling, session.mesh)
            assert len(group.scored) == num_samples
            peaks.append(_most_resident())
        engine.close()
    return peaks


@pytest.mark.usefixtures("heavy_imports")
def test_sixteen_rollouts_take_the_memory_of_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", Kind("libx264", {"g": "30", "preset": "ultrafast"}), NUM_FRAMES)
    cfg = small_config(tiny_checkpoint, tmp_path, tensor=WORLD, rollout_tensor=WORLD)
    area = SIDE * SIDE
    data = replace(cfg.data, num_frames=NUM_FRAMES, min_pixels=area, max_pixels=area, max_prompt_tokens=3456)
    cfg = replace(cfg, data=data, rollout=replace(cfg.rollout, kv_cache_gib=0.02))
    peaks = run_world(WORLD, _rollout_peaks, cfg, video, (1, 1, 16))  # the first warms up
    more = sum(sixteen - one for _, one, sixteen in peaks)
    assert more < FRAME_BYTES, f"16 rollouts take {more / 1e6:.1f} MB more; a video has {FRAME_BYTES / 1e6:.1f} MB"
