# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are looked at, and how far apart in time they are. Decided here and nowhere else.

Two rules. "time" goes by presentation timestamps, so it is right where the frame rate varies. "processor" takes what
the Hugging Face processor of the model's family would, which counts frames and trusts the average rate of the header.
A clip with fewer frames than asked for gives each of them once. The count is then brought to a multiple of the temporal
patch by repeating the last frame, as transformers' Qwen video processors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_rl.types import VideoInfo

# transformers' Qwen2.5-VL assumes one second between temporal patches where a video has no timing.
DEFAULT_SECONDS_PER_GRID = 1.0
MAX_FRAMES = 8192
_ALL = (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class FrameSettings:
    """How many frames of a video to take. `num_frames` > 0 takes that many; 0 takes `fps` a second, bounded."""

    num_frames: int
    fps: float = 0.0
    min_frames: int = 4
    max_frames: int = MAX_FRAMES
    rule: Literal["time", "processor"] = "time"

    def problems(self, multiple: int) -> list[str]:
        """What is wrong with them for a model whose temporal patch is `multiple` frames."""
        found = []
        if not 0 <= self.num_frames <= MAX_FRAMES or self.num_frames % multiple:
            found.append(
                f"data.num_frames={self.num_frames}: the model joins {multiple} frames into one temporal patch; "
                f"use a multiple of {multiple}, at most {MAX_FRAMES}"
            )
        if self.num_frames:
            return found
        if not (self.fps > 0 and math.isfinite(self.fps)):
            found.append(f"data.fps={self.fps}: data.num_frames=0 needs a frame rate; set data.fps above 0")
        if not multiple <= self.max_frames <= MAX_FRAMES:
            found.append(
                f"data.max_frames={self.max_frames}: not between one temporal patch of the model and {MAX_FRAMES}; "
                f"use at least {multiple}"
            )
        elif not 1 <= self.min_frames <= self.max_frames:
            found.append(
                f"data.min_frames={self.min_frames}: not between 1 and data.max_frames={self.max_frames}; lower it"
            )
        return found


def choose_frames(
    info: VideoInfo,
    settings: FrameSettings,
    multiple: int,
    family: Literal["stride", "linspace"] = "linspace",
    span: tuple[float, float] = _ALL,
) -> tuple[int, ...]:
    """Frame indices, ascending, their count a multiple of `multiple`.

    `span` (start, end) in seconds limits them to what is on the screen then. `family` names the counting rule of the
    model's Hugging Face processor (see FAMILIES). Raises ValueError for a span in which the video shows nothing.
    """
    assert not settings.problems(multiple)
    first, stop = frames_within(info, span)
    if settings.rule == "processor":
        count = _processor_count(stop - first, info.rate, settings, multiple, family)
        chosen = [first + index for index in FAMILIES[family](stop - first, count)]
    else:
        chosen = _by_time(np.asarray(info.timestamps[first:stop]), first, settings, multiple)
    return tuple(chosen + chosen[-1:] * (-len(chosen) % multiple))


def frames_within(info: VideoInfo, span: tuple[float, float]) -> tuple[int, int]:
    """(first, stop): the frame on the screen at `start`, and the first one that appears at `end` or later."""
    start, end = span
    if not 0 <= start < end:
        raise ValueError(f"video_start={start}, video_end={end}: not a range of seconds; start must be below end")
    if start > info.timestamps[-1]:
        raise ValueError(f"video_start={start}: the last frame is shown at {info.timestamps[-1]:.3f} s; start earlier")
    timestamps = np.asarray(info.timestamps)
    first = max(int(np.searchsorted(timestamps, start + 1e-6, side="right")) - 1, 0)  # 1e-6: 0.3 and 0.1 * 3
    return first, max(int(np.searchsorted(timestamps, end - 1e-6, side="left")), first + 1)


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


def patch_times(timestamps: Sequence[float], temporal_patch_size: int) -> tuple[float, ...]:
    """Second of each temporal patch: the middle between its first and its last frame, as Qwen3-VL's prompts name it."""
    assert len(timestamps) % temporal_patch_size == 0
    starts = timestamps[::temporal_patch_size]
    ends = timestamps[temporal_patch_size - 1 :: temporal_patch_size]
    return tuple((start + end) / 2 for start, end in zip(starts, ends, strict=True))


# ------------------------------------------------------------------------------------------------------ by timestamp


def _by_time(timestamps: np.ndarray, first: int, settings: FrameSettings, multiple: int) -> list[int]:
    total, begin, end = len(timestamps), timestamps[0], timestamps[-1]
    if settings.num_frames > 0:
        count = settings.num_frames
        times = np.linspace(begin, end, count)
    else:
        num_ticks = math.floor((end - begin) * settings.fps + 1e-6) + 1  # 1e-6: 9.9999999 ticks are 10
        wanted = min(max(num_ticks, settings.min_frames), settings.max_frames)
        # Rounded down, so that no tick lies outside the clip; a clip shorter than one temporal patch still gives one.
        count = max(wanted // multiple * multiple, multiple)
        on_ticks = max(multiple, settings.min_frames) <= num_ticks <= settings.max_frames
        times = begin + np.arange(count) / settings.fps if on_ticks else np.linspace(begin, end, count)
        if total <= wanted:
            return list(range(first, first + total))
    if total <= count:
        return list(range(first, first + total))
    return [first + index for index in _nearest(timestamps, times)]


def _nearest(timestamps: np.ndarray, times: np.ndarray) -> list[int]:
    """Index of the timestamp nearest to each time; the even one of two equally near, as NumPy rounds."""
    where = np.interp(times, timestamps, np.arange(len(timestamps)))
    return where.round(6).round().astype(int).tolist()  # 6 digits: 2.4999999 is 2.5


# ------------------------------------------------------------------------------- as Hugging Face's processors count


def _stride(total: int, count: int) -> list[int]:
    """Qwen2-VL, Qwen2.5-VL: one frame at the start of each of `count` equal parts."""
    import torch  # only here: a recipe is checked without torch

    # torch's own arange: in single precision it rounds up now and then, and those are the processor's frames. For a
    # few counts it gives one frame too many, as theirs does; that one is left out.
    return torch.arange(0, total, total / count).int().tolist()[:count]


def _linspace(total: int, count: int) -> list[int]:
    """Qwen3-VL: evenly from the first frame to the last."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


FAMILIES: dict[str, Callable[[int, int], list[int]]] = {"stride": _stride, "linspace": _linspace}


def _processor_count(total: int, rate: float, settings: FrameSettings, multiple: int, family: str) -> int:
    """transformers 5: Qwen2VLVideoProcessor.sample_frames and Qwen3VLVideoProcessor.sample_frames."""
    if settings.num_frames > 0:
        return min(settings.num_frames, total)
    if family == "linspace":
        return min(max(int(total / rate * settings.fps), settings.min_frames), settings.max_frames, total)
    most = math.floor(min(settings.max_frames, total) / multiple) * multiple
    count = min(max(total / rate * settings.fps, settings.min_frames), most, total)
    return max(math.floor(count / multiple) * multiple, min(multiple, total))
