# SPDX-License-Identifier: Apache-2.0
"""Clocks that repeat a time, go back or stand still: the file's times, the decoder's order, the right pictures."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from data.video.frames import FrameSettings, choose_frames, frames_within
from data.video.index_store import IndexStore, index_video
from data.video.pixels import read_frames
from data.video.timestamps import ascending
from tests.video_files import Kind, full_decode, write_video

EIGHT = FrameSettings(num_frames=8)


def variable(index: int) -> int:
    """In 1/1000 s: 25 frames in the first second, then one every 0.4 s."""
    return index * 40 if index < 25 else 1000 + (index - 25) * 400


def with_times(source: str, target: Path, times: dict[int, int]) -> str:
    """A copy in which some packets, by number, have other timestamps (1/1000 s), written as they are."""
    with av.open(source) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            packet.stream = stream
            if number in times:
                packet.pts = packet.dts = int(Fraction(times[number], 1000) / packet.time_base)
            container.mux(packet)
    return str(target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return write_video(tmp_path_factory.mktemp("whole") / "a.webm", Kind("libvpx", {"g": "10"}), 50)


def with_clock(whole: str, target: Path, times: list[int]) -> str:
    return with_times(whole, target, dict(enumerate(times)))


def test_one_repeated_timestamp_moves_one_frame_by_a_tick(whole, tmp_path):
    times = [variable(index) for index in range(50)]
    right = index_video(with_clock(whole, tmp_path / "right.webm", times)).info()
    times[10] = times[9]
    path = with_clock(whole, tmp_path / "repeated.webm", times)
    info = index_video(path).info()
    times[10] += 1
    assert np.allclose(info.timestamps, np.asarray(times) / 1000)
    chosen, expected = choose_frames(info, EIGHT, 2), choose_frames(right, EIGHT, 2)
    assert np.abs(np.subtract(chosen, expected)).max() <= 1
    assert frames_within(info, (1.0, 3.0)) == frames_within(right, (1.0, 3.0)) == (25, 30)
    assert np.array_equal(read_frames(path, [9, 10, 11, 49, 0]), full_decode(path)[[9, 10, 11, 49, 0]])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_repeated_timestamps_among_pictures_that_are_reordered(tmp_path, codec):
    """Only a decoder knows the order; it is asked once, and the pictures are then found as usual."""
    source = write_video(tmp_path / "a.mp4", Kind(codec, {"g": "10", "bf": "2"}), 50)
    path = str(tmp_path / "repeated.mp4")
    with av.open(source) as given, av.open(path, "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(video=0) if packet.size]
        can = [(one, two) for one, two in pairwise(packets) if two.dts <= one.pts < two.pts or one.pts > two.pts > 0]
        for before, packet in can[6:30:8]:
            packet.pts = before.pts
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    with av.open(path) as container:
        assert len({packet.pts for packet in container.demux(video=0) if packet.size}) < 50
    index, truth = index_video(path), full_decode(path)
    assert len(truth) == index.num_frames == 50 and not index.by_number
    assert np.allclose(index.info().timestamps, np.arange(50) / 25, atol=0.13)
    for number in range(50):
        assert np.array_equal(read_frames(path, [number])[0], truth[number])


def test_one_timestamp_far_ahead_among_pictures_that_are_reordered(tmp_path):
    source = write_video(tmp_path / "a.mp4", Kind("libx264", {"g": "10", "bf": "2"}), 90)
    path = str(tmp_path / "ahead.mkv")
    with av.open(source) as given, av.open(path, "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            packet.pts += int(5 / packet.time_base) if number == 11 else 0
            packet.stream = stream
            container.mux(packet)
    with av.open(path) as container:
        assert max(packet.pts for packet in container.demux(video=0) if packet.size) > 5_000
    index, truth = index_video(path), full_decode(path)
    assert np.allclose(index.info().timestamps, np.arange(90) / 25, atol=0.05)
    assert np.array_equal(read_frames(path, list(range(90))), truth)


def test_a_clock_that_is_set_back_goes_on(tmp_path):
    """Two recordings joined byte after byte. Where they join, the container reports lost data."""
    half = Path(write_video(tmp_path / "half.ts", Kind("mpeg2video", {"g": "10"}), 70)).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(half + half)
    index, truth = index_video(str(path)), full_decode(str(path))
    assert index.num_frames == len(truth) == 140
    assert np.allclose(np.diff(index.info().timestamps), 0.04, atol=1e-3)
    for number in (0, 35, 66, 70, 71, 105, 139):
        assert np.array_equal(read_frames(str(path), [number])[0], truth[number])


def test_times_of_avi_are_those_of_its_frames_not_of_the_headers_rate(tmp_path):
    path = write_video(tmp_path / "a.avi", Kind("libx264", {"g": "15", "bf": "3"}), 50)
    info = index_video(path).info()
    assert np.allclose(info.timestamps, np.arange(50) / 25, atol=1e-3)
    assert info.rate == pytest.approx(25, rel=0.05)


def test_a_repaired_clock_is_kept_with_the_index(whole, tmp_path):
    times = [index * 40 for index in range(50)]
    times[21] = times[20]
    path = with_clock(whole, tmp_path / "a.webm", times)
    store = IndexStore(tmp_path / "index")
    made, kept = index_video(path, store), store.load(path, ((s := Path(path).stat()).st_size, s.st_mtime_ns))
    assert kept is not None
    for name in ("pts", "packet_pts", "packet_stamp"):
        assert np.array_equal(getattr(made, name), getattr(kept, name))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 40, 80], [0, 40, 80]),
        ([0, 40, 40, 80], [0, 40, 41, 80]),
        ([0, 0, 40, 40, 80, 80], [0, 1, 40, 41, 80, 81]),
        ([0, 40, 80, 60, 120, 160], [0, 40, 80, 81, 120, 160]),  # one is behind
        ([0, 40, 9000, 120, 160, 200], [0, 40, 41, 120, 160, 200]),  # one is far ahead
        ([0, 40, 80, 0, 40, 80], [0, 40, 80, 120, 160, 200]),  # set back
        ([0, 40, 80, 80], [0, 40, 80, 81]),
        ([7], [7]),
        ([5, 5, 5], None),  # stands still
    ],
)
def test_ascending_times(times, expected):
    made = ascending(np.asarray(times))
    assert made is None if expected is None else made.tolist() == expected
