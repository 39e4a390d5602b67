# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are looked at, and how far apart in time they are. Decided here and nowhere else.

A clip with fewer frames than asked for gives each of them once. The count is then brought to a multiple of the temporal
patch by repeating the last frame, as transformers' Qwen video processor does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.types import VideoInfo

# transformers' Qwen2.5-VL assumes one second between temporal patches where a video has no timing.
DEFAULT_SECONDS_PER_GRID = 1.0


def frame_setting_problems(num_frames: int, fps: float, max_frames: int, multiple: int) -> list[str]:
    """What is wrong with the user's settings for a model whose temporal patch is `multiple` frames."""
    problems = []
    if num_frames < 0 or num_frames % multiple:
        problems.append(
            f"data.num_frames={num_frames}: the model joins {multiple} frames into one temporal patch; "
            f"use a multiple of {multiple}"
        )
    if num_frames == 0 and not (fps > 0 and math.isfinite(fps)):
        problems.append(f"data.fps={fps}: data.num_frames=0 needs a frame rate; set data.fps above 0")
    if num_frames == 0 and max_frames < multiple:
        problems.append(
            f"data.max_frames={max_frames}: smaller than one temporal patch of the model; use at least {multiple}"
        )
    return problems


def choose_frames(info: VideoInfo, num_frames: int, fps: float, max_frames: int, multiple: int) -> tuple[int, ...]:
    """Frame indices, ascending, their count a multiple of `multiple`.

    num_frames > 0 takes that many, uniformly by index, first and last included. num_frames == 0 takes the frame shown
    nearest to each of the times 0, 1/fps, 2/fps ...: right for variable frame rates too.
    """
    assert not frame_setting_problems(num_frames, fps, max_frames, multiple)
    if num_frames > 0:
        count = min(num_frames, info.num_frames)
        chosen = np.linspace(0, info.num_frames - 1, count).round().astype(int).tolist()
    else:
        chosen = _at_rate(info, fps, max_frames, multiple)
    padding = -len(chosen) % multiple
    return tuple(chosen + chosen[-1:] * padding)


def seconds_per_grid(info: VideoInfo, indices: Sequence[int], temporal_patch_size: int) -> float:
    """Average real spacing of the chosen frames times the temporal patch; repeats at the end are padding, not time.

    A single frame, or frames that all have the same time, have no spacing: DEFAULT_SECONDS_PER_GRID.
    """
    num_padding = sum(1 for index in indices if index == indices[-1]) - 1
    num_intervals = len(indices) - num_padding - 1
    duration = info.timestamps[indices[-1]] - info.timestamps[indices[0]]
    if num_intervals < 1 or duration <= 0:
        return DEFAULT_SECONDS_PER_GRID
    return duration / num_intervals * temporal_patch_size


def _at_rate(info: VideoInfo, fps: float, max_frames: int, multiple: int) -> list[int]:
    timestamps = np.asarray(info.timestamps)
    last = float(timestamps[-1])
    num_ticks = math.floor(last * fps + 1e-6) + 1  # 1e-6: 9.9999999 ticks are 10
    if info.num_frames <= min(num_ticks, max_frames):
        return list(range(info.num_frames))
    # Rounded down, so that no tick lies outside the clip; a clip shorter than one temporal patch still gives one.
    count = max(min(num_ticks, max_frames) // multiple * multiple, multiple)
    times = np.arange(count) / fps if multiple <= num_ticks <= max_frames else np.linspace(0.0, last, count)
    return _nearest(timestamps, times) if count < info.num_frames else list(range(info.num_frames))


def _nearest(timestamps: np.ndarray, times: np.ndarray) -> list[int]:
    """Index of the timestamp nearest to each time; the earlier one of two equally near."""
    after = np.searchsorted(timestamps, times).clip(1, len(timestamps) - 1)
    earlier = times - timestamps[after - 1] <= timestamps[after] - times
    return (after - earlier).tolist()
