# SPDX-License-Identifier: Apache-2.0
"""Which frames are chosen, against hand-computed lists, NumPy's own linspace, and transformers' processors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.video.frames import FrameSettings, choose_frames, frames_within, patch_times, seconds_per_grid
from megatron_rl.runtime.device import define_torchvision_operators
from megatron_rl.types import VideoInfo


def clip(timestamps, fps: float = 0.0) -> VideoInfo:
    return VideoInfo("clip.mp4", "h264", 64, 48, tuple(float(t) for t in timestamps), fps)


def steady(num_frames: int, fps: float = 30.0) -> VideoInfo:
    return clip(np.arange(num_frames) / fps)


def number(count: int, rule="time") -> FrameSettings:
    return FrameSettings(count, rule=rule)


def rate(fps: float, max_frames: int, min_frames: int = 1, rule="time") -> FrameSettings:
    return FrameSettings(0, fps, min_frames, max_frames, rule)


# ------------------------------------------------------------------------------------------------------ by timestamp


@pytest.mark.parametrize("total", [8, 9, 100, 18_000, 107_892])
@pytest.mark.parametrize("wanted", [2, 4, 8, 8192])
@pytest.mark.parametrize("fps", [30.0, 30_000 / 1001, 24.0])
def test_uniform_is_linspace(total, wanted, fps):
    expected = np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist()
    assert choose_frames(steady(total, fps), number(wanted), 2) == (*expected, *expected[-1:] * (len(expected) % 2))


def test_uniform_never_repeats_while_the_clip_has_enough_frames():
    for total in range(16, 64):
        assert len(set(choose_frames(steady(total), number(16), 2))) == 16


def test_uniform_follows_timestamps_where_the_frame_rate_varies():
    """A second at 10 frames/s, then one frame every second until 10 s: evenly in time, not in number."""
    times = [*np.arange(10) / 10, *range(1, 11)]
    assert choose_frames(clip(times), number(6), 2) == (0, 11, 13, 15, 17, 19)


def test_a_frame_that_stays_on_the_screen_is_taken_more_than_once():
    assert choose_frames(clip([0.0, 0.1, 0.2, 0.3, 10.0]), number(4), 2) == (0, 3, 4, 4)


def test_short_clip_gives_each_frame_once_and_repeats_only_the_last():
    assert choose_frames(steady(5), number(8), 2) == (0, 1, 2, 3, 4, 4)
    assert choose_frames(steady(6), number(8), 2) == (0, 1, 2, 3, 4, 5)
    assert choose_frames(steady(5), number(8), 4) == (0, 1, 2, 3, 4, 4, 4, 4)
    assert choose_frames(steady(1), number(8), 2) == (0, 0)


def test_rate_takes_the_nearest_frame_to_each_tick():
    assert choose_frames(steady(300), rate(1.0, 100), 2) == (0, 30, 60, 90, 120, 150, 180, 210, 240, 270)
    assert choose_frames(steady(300), rate(2.0, 100), 1)[:4] == (0, 15, 30, 45)
    assert choose_frames(clip([0.0, 0.4, 0.9, 1.6, 2.1, 2.2, 3.3]), rate(1.0, 100), 2) == (0, 2, 4, 6)


def test_rate_follows_timestamps_where_the_frame_rate_varies():
    times = [*np.arange(10) / 10, *range(1, 11)]
    assert choose_frames(clip(times), rate(1.0, 100), 1) == (0, *range(10, 20))


def test_rate_rounds_the_count_down_to_the_temporal_patch():
    assert len(choose_frames(steady(300), rate(0.5, 100), 2)) == 4  # ticks at 0 2 4 6 8 s
    assert choose_frames(steady(15), rate(1.0, 100), 2) == (0, 14)  # one tick only: first and last frame


def test_rate_above_that_of_the_clip_gives_each_frame_once():
    assert choose_frames(steady(7), rate(60.0, 100), 2) == (0, 1, 2, 3, 4, 5, 6, 6)


def test_bounds_on_the_count_spread_over_the_whole_clip():
    assert choose_frames(steady(301), rate(10.0, 5), 2) == (0, 100, 200, 300)
    assert choose_frames(steady(301), rate(0.1, 100, min_frames=4), 2) == (0, 100, 200, 300)


@pytest.mark.parametrize("seed", range(20))
def test_any_clip_any_setting(seed):
    """Ascending, in range, a whole number of patches, within the bounds; as near to equal spacing as frames are."""
    rng = np.random.default_rng(seed)
    total = int(rng.integers(1, 400))
    times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.001, 0.2, total - 1))])
    multiple = int(rng.choice([1, 2, 4]))
    for settings in (number(4 * int(rng.integers(1, 60))), rate(float(rng.uniform(0.1, 60)), int(rng.integers(8, 99)))):
        chosen = choose_frames(clip(times), settings, multiple)
        assert len(chosen) % multiple == 0 and list(chosen) == sorted(chosen)
        assert 0 <= chosen[0] and chosen[-1] < total
        assert len(chosen) <= (settings.num_frames or max(settings.max_frames, multiple))
        if settings.num_frames and total > settings.num_frames:
            ticks = np.linspace(0, times[-1], settings.num_frames)
            nearest = np.abs(times[None] - ticks[:, None]).min(1)
            assert np.allclose(np.abs(times[list(chosen)] - ticks), nearest, atol=1e-6)


# --------------------------------------------------------------------------------------------------- ranges of seconds


def test_a_range_is_what_is_on_the_screen_then():
    info = clip([0, 1, 2, 5, 9])
    assert frames_within(info, (0.0, math.inf)) == (0, 5)
    assert frames_within(info, (1.0, 5.0)) == (1, 3)  # a frame that appears at the end is not seen
    assert frames_within(info, (3.0, 5.1)) == (2, 4)  # 2 is still on the screen
    assert frames_within(info, (6.0, 7.0)) == (3, 4)
    assert frames_within(info, (9.0, 12.0)) == (4, 5)
    assert frames_within(steady(100, 10.0), (0.1 * 3, 0.7)) == (3, 7)


def test_frames_of_a_range():
    info = steady(300, 10.0)
    for rule in ("time", "processor"):
        assert choose_frames(info, number(4, rule), 2, "linspace", (10.0, 20.1)) == (100, 133, 167, 200)
    assert choose_frames(info, rate(1.0, 100), 2, "linspace", (2.0, 6.0)) == (20, 30, 40, 50)
    assert choose_frames(info, number(4), 2, "linspace", (7.0, 7.05)) == (70, 70)


@pytest.mark.parametrize(
    ("span", "why"), [((5.0, 5.0), "below end"), ((-1.0, 2.0), "range"), ((30.0, 40.0), "earlier")]
)
def test_a_range_that_shows_nothing_is_refused(span, why):
    with pytest.raises(ValueError, match=f"video_start={span[0]}.*{why}"):
        choose_frames(steady(300, 10.0), number(4), 2, "linspace", span)


# ------------------------------------------------------------------------------------- as transformers' processors do


@pytest.fixture(scope="module", autouse=True)
def torchvision() -> None:
    define_torchvision_operators()


def processor(family: str):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return {"stride": Qwen2VLVideoProcessor, "linspace": Qwen3VLVideoProcessor}[family]()


def sampled_by(family: str, info: VideoInfo, **how) -> list[int]:
    from transformers.video_utils import VideoMetadata

    theirs = processor(family)
    theirs.min_frames, theirs.max_frames = how.pop("min_frames", 4), how.pop("max_frames", 768)
    if "num_frames" in how:
        theirs.fps = None
    metadata = VideoMetadata(total_num_frames=info.num_frames, fps=info.average_fps)
    return [int(index) for index in theirs.sample_frames(metadata, **how)]


@pytest.mark.parametrize("family", ["stride", "linspace"])
def test_the_same_frames_as_the_processor(family):
    """300 clips. Where the processor's count is odd (Qwen3-VL) ours has the repeated frame it adds when it patchifies.
    Where rounding makes the processor's list one longer than the count it computed (Qwen2-VL), ours is not."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        total, fps = int(rng.integers(8, 40_000)), float(rng.choice([24, 25, 30, 30_000 / 1001, 60, 12.5]))
        info = clip(np.arange(total) / fps, fps)
        count = 2 * int(rng.integers(1, min(total, 8192) // 2 + 1))
        expected = sampled_by(family, info, num_frames=count)[:count]
        assert list(choose_frames(info, number(count, "processor"), 2, family)) == expected
        wanted, most = float(rng.choice([0.25, 0.5, 1.0, 2.0, 3.7])), int(rng.integers(8, 800))
        expected = sampled_by(family, info, fps=wanted, max_frames=most)
        expected = expected[:-1] if family == "stride" and len(expected) % 2 else expected
        chosen = list(choose_frames(info, rate(wanted, most, 4, "processor"), 2, family))
        assert chosen == expected + expected[-1:] * (len(expected) % 2)


@pytest.mark.parametrize("family", ["stride", "linspace"])
def test_where_the_rate_is_steady_both_rules_agree_on_the_time_span(family):
    info = clip(np.arange(900) / 30, 30.0)
    by_time = choose_frames(info, number(16), 2, family)
    by_processor = choose_frames(info, number(16, "processor"), 2, family)
    assert (by_time == by_processor) == (family == "linspace")
    assert abs(np.subtract(by_time, by_processor)).max() <= 900 / 16


def test_the_same_grid_as_the_processor():
    from model_providers.qwen2_5_vl.vision import QwenMediaSpec

    theirs = processor("stride")
    rng = np.random.default_rng(1)
    for _ in range(200):
        count, height, width = 2 * int(rng.integers(1, 400)), int(rng.integers(28, 2200)), int(rng.integers(28, 2200))
        low, total = 28 * 28 * int(rng.integers(4, 40)), int(theirs.max_video_tokens * 28 * 28 * 0.9)
        high = low + 28 * 28 * int(rng.integers(0, 800))
        spec = QwenMediaSpec(14, 2, 2, low, high, total, {}, (0,) * 3, (1,) * 3)
        for ours, capped in ((spec, True), (QwenMediaSpec(14, 2, 2, low, high, 0, {}, (0,) * 3, (1,) * 3), False)):
            size_hw = ours.size_hw(count, height, width)
            assert size_hw == resized_by(theirs, count, height, width, low, high, capped)


def resized_by(theirs, count, height, width, low, high, capped) -> tuple[int, int]:
    """The size that the processor's own resize asks torchvision for; no pixels are touched."""
    import torch
    from transformers.image_utils import SizeDict

    seen = {}
    base = type(theirs).__mro__[1]
    original = base.resize
    base.resize = lambda self, image, size, resample: seen.update(size=(size.height, size.width)) or image
    try:
        theirs.resize(
            torch.empty(1, 1, 1, 1, 1, dtype=torch.uint8).expand(1, count, 3, height, width),
            SizeDict(shortest_edge=low, longest_edge=high), None, 28, 2, cap_pixels_per_frame=capped,
        )  # fmt: skip
    finally:
        base.resize = original
    return seen["size"]


def test_the_same_times_as_qwen3_vl_writes_into_the_prompt():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    info = clip(np.arange(700) / 25, 25.0)
    for count in (2, 6, 31, 64):
        indices = choose_frames(info, rate(count / 28, count, 1, "processor"), 2, "linspace")
        theirs = Qwen3VLProcessor._calculate_timestamps(None, list(indices), 25.0, 2)
        assert np.allclose(patch_times([info.timestamps[i] for i in indices], 2), theirs)


def test_seconds_per_grid_of_evenly_spaced_frames_is_that_of_qwen2_5_vl():
    """There it is temporal_patch / (frames taken / frames there * rate)."""
    info = clip(np.arange(960) / 24, 24.0)
    indices = choose_frames(info, FrameSettings(80, rule="processor"), 2, "stride")
    assert seconds_per_grid(info, indices, 2) == pytest.approx(2 / (80 / 960 * 24))


# ------------------------------------------------------------------------------------------------ spacing and settings


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
    assert FrameSettings(8).problems(2) == FrameSettings(8192).problems(2) == rate(2.0, 8).problems(2) == []
    assert "data.num_frames=7" in FrameSettings(7).problems(2)[0]
    assert "at most 8192" in FrameSettings(8194).problems(2)[0]
    by_rate, bound = FrameSettings(0, 0.0, 1, 1).problems(2)
    assert "data.fps=0.0" in by_rate and "data.max_frames=1" in bound
    assert "data.min_frames=9" in FrameSettings(0, 1.0, 9, 8).problems(2)[0]
