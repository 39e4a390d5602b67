# SPDX-License-Identifier: Apache-2.0
"""Which frames are chosen, against hand-computed lists and NumPy's own linspace."""

from __future__ import annotations

import numpy as np
import pytest

from data.frames import choose_frames, frame_setting_problems, seconds_per_grid
from megatron_rl.types import VideoInfo


def clip(timestamps) -> VideoInfo:
    return VideoInfo("clip.mp4", "h264", 64, 48, tuple(float(t) for t in timestamps))


def steady(num_frames: int, fps: float = 30.0) -> VideoInfo:
    return clip(np.arange(num_frames) / fps)


@pytest.mark.parametrize("total", [8, 9, 100, 18_000])
@pytest.mark.parametrize("wanted", [2, 4, 8])
def test_uniform_is_linspace(total, wanted):
    assert choose_frames(steady(total), wanted, 0.0, 0, 2) == tuple(np.linspace(0, total - 1, wanted).round())


def test_uniform_never_repeats_while_the_clip_has_enough_frames():
    for total in range(16, 64):
        assert len(set(choose_frames(steady(total), 16, 0.0, 0, 2))) == 16


def test_short_clip_gives_each_frame_once_and_repeats_only_the_last():
    assert choose_frames(steady(5), 8, 0.0, 0, 2) == (0, 1, 2, 3, 4, 4)
    assert choose_frames(steady(6), 8, 0.0, 0, 2) == (0, 1, 2, 3, 4, 5)
    assert choose_frames(steady(5), 8, 0.0, 0, 4) == (0, 1, 2, 3, 4, 4, 4, 4)
    assert choose_frames(steady(1), 8, 0.0, 0, 2) == (0, 0)


def test_rate_takes_the_nearest_frame_to_each_tick():
    assert choose_frames(steady(300), 0, 1.0, 100, 2) == (0, 30, 60, 90, 120, 150, 180, 210, 240, 270)
    assert choose_frames(steady(300), 0, 2.0, 100, 1)[:4] == (0, 15, 30, 45)
    assert choose_frames(clip([0.0, 0.4, 0.9, 1.6, 2.1, 2.2, 3.3]), 0, 1.0, 100, 2) == (0, 2, 4, 6)


def test_rate_follows_timestamps_where_the_frame_rate_varies():
    # A second at 10 frames/s, then one frame every second: by index these frames would be far from the ticks.
    times = [*np.arange(10) / 10, *range(1, 11)]
    assert choose_frames(clip(times), 0, 1.0, 100, 1) == (0, *range(10, 20))


def test_rate_rounds_the_count_down_to_the_temporal_patch():
    assert len(choose_frames(steady(300), 0, 0.5, 100, 2)) == 4  # ticks at 0 2 4 6 8 s
    assert choose_frames(steady(15), 0, 1.0, 100, 2) == (0, 14)  # one tick only: first and last frame


def test_rate_above_that_of_the_clip_gives_each_frame_once():
    assert choose_frames(steady(7), 0, 60.0, 100, 2) == (0, 1, 2, 3, 4, 5, 6, 6)


def test_max_frames_spreads_over_the_whole_clip():
    assert choose_frames(steady(301), 0, 10.0, 5, 2) == (0, 100, 200, 300)


def test_seconds_per_grid_is_real_spacing_times_temporal_patch():
    info = steady(300)
    assert seconds_per_grid(info, (0, 30, 60, 90), 2) == pytest.approx(2.0)
    assert seconds_per_grid(clip([0, 1, 5, 6]), (0, 1, 2, 3), 2) == pytest.approx(4.0)
    assert seconds_per_grid(info, (30, 45), 1) == pytest.approx(0.5)


def test_seconds_per_grid_ignores_padding_and_has_a_rule_without_time():
    assert seconds_per_grid(steady(5, fps=1.0), (0, 1, 2, 3, 4, 4), 2) == pytest.approx(2.0)
    assert seconds_per_grid(steady(1), (0, 0), 2) == 1.0
    assert seconds_per_grid(clip([0.0, 0.0]), (0, 1), 2) == 1.0


def test_settings_are_checked_together():
    assert frame_setting_problems(8, 0.0, 0, 2) == []
    assert frame_setting_problems(0, 2.0, 8, 2) == []
    assert "data.num_frames=7" in frame_setting_problems(7, 0.0, 0, 2)[0]
    rate, bound = frame_setting_problems(0, 0.0, 1, 2)
    assert "data.fps=0.0" in rate and "data.max_frames=1" in bound
