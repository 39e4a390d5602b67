# SPDX-License-Identifier: Apache-2.0
"""Decoded frames against a full, sequential decode of the same file, for every kind of file; and no work too much."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from data.video.decode import PacketReader, decode_frames
from data.video.gop_plan import plan_runs
from data.video.index import VideoIndex
from data.video.index_store import index_video
from data.video.pixels import read_frames
from megatron_rl.errors import VideoDecodeError
from tests.video_files import KINDS, NUM_FRAMES, Kind, copy_packets, full_decode, write_kind, write_video

CLOSED_GOPS = ["h264_bframes.mp4", "hevc.mp4", "vp9.webm"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_kind(folder, name) for name in KINDS}


@pytest.fixture(scope="module")
def truths(videos) -> dict[str, np.ndarray]:
    return {name: full_decode(path) for name, path in videos.items()}


@pytest.mark.parametrize("name", KINDS)
def test_frames_equal_a_full_decode(videos, truths, name):
    """Sorted, random and repeated; all, and every single one alone; on 1 to 3 threads."""
    path, truth = videos[name], truths[name]
    assert len(truth) == NUM_FRAMES == index_video(path).num_frames
    order = np.random.default_rng(0).permutation(NUM_FRAMES).tolist()
    for num_threads in (1, 2, 3):
        for indices in (list(range(NUM_FRAMES)), order, order[:25], [order[0], *order[:3]], list(range(0, 90, 7))):
            assert np.array_equal(read_frames(path, indices, num_threads), truth[indices])
    for index in range(NUM_FRAMES):
        assert np.array_equal(read_frames(path, [index])[0], truth[index])


def _clocks(index: VideoIndex) -> tuple[np.ndarray, np.ndarray]:
    return index.packet_pts, index.packet_stamp


def test_the_test_videos_are_what_they_claim(videos):
    """Open groups hold pictures shown before their keyframe; some pictures may be dropped; HEVC has sub-layers."""
    for name in ("h264_open_gop.mp4", "h264_open_gop.ts", "hevc_open_gop.mkv"):
        index = index_video(videos[name])
        keys = np.flatnonzero(index.is_key)
        assert len(keys) > 4 and any(index.packet_pts[key + 1] < index.packet_pts[key] for key in keys[1:-1])
    for name in ("h264_bframes.mp4", "hevc.mp4", "hevc_layers.ts", "mpeg4.mp4", "mpeg4.avi", "mpeg2.ts"):
        assert 0.3 < index_video(videos[name]).is_droppable.mean() < 0.7, name
    by_number = [name for name in KINDS if index_video(videos[name]).by_number]
    assert by_number == ["h264_raw.h264"], "no timestamps of its own"
    repaired = [name for name in KINDS if not np.array_equal(*_clocks(index_video(videos[name])))]
    assert repaired == ["h264_bframes.avi", "mpeg2.mpg"], "times of decoding only, or some twice"
    assert index_video(videos["h264_one_gop.mp4"]).is_key.sum() == 1
    assert index_video(videos["mjpeg.mkv"]).is_key.all()


def test_a_file_cut_without_decoding_gives_what_its_edit_list_shows(videos, tmp_path):
    """Frames before the cut are stored, decoded and never shown."""
    source = videos["h264_bframes.mp4"]
    path = copy_packets(
        source, tmp_path / "cut.mp4", start=400, num_skipped=0, options={"avoid_negative_ts": "disabled"}
    )
    truth = full_decode(path)
    index = index_video(path)
    assert index.num_frames == len(truth) == NUM_FRAMES - 10 < len(index.packet_pts)
    assert np.array_equal(truth, full_decode(source)[10:])
    for frames in (list(range(80)), [0], [4], [5], [79, 0]):
        assert np.array_equal(read_frames(path, frames, 2), truth[frames])


@pytest.mark.parametrize("name", ["h264_open_gop.ts", "hevc_layers.ts"])
def test_a_stream_that_starts_in_the_middle_of_a_group(videos, tmp_path, name):
    """Nothing before the first keyframe can be decoded: the video starts there."""
    path = copy_packets(videos[name], tmp_path / name, start=0, num_skipped=5, options={})
    whole, truth = full_decode(videos[name]), full_decode(path)
    index = index_video(path)
    shown = whole[-index.num_frames :]
    assert 60 < index.num_frames <= len(truth)
    for frames in (list(range(index.num_frames)), [0], [7, 3]):
        assert np.array_equal(read_frames(path, frames), shown[frames])


# ------------------------------------------------------------------------------------------------- no work too much


class Counting:
    """Counts the packets that decoders get."""

    def __init__(self, monkeypatch):
        self.decoded, self.lock = 0, threading.Lock()
        original = PacketReader.decode

        def decode(reader, packet):
            with self.lock:
                self.decoded += packet is not None
            return original(reader, packet)

        monkeypatch.setattr(PacketReader, "decode", decode)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", CLOSED_GOPS)
def test_only_needed_packets_are_decoded(videos, monkeypatch, name, num_threads):
    """Of each group that holds a wanted frame: the references up to it, and the wanted pictures."""
    index = index_video(videos[name])
    counting = Counting(monkeypatch)
    rng = np.random.default_rng(3)
    for _ in range(10):
        frames = sorted(rng.permutation(NUM_FRAMES)[: int(rng.integers(1, 12))].tolist())
        expected = 0
        packets = {int(index.packet_of_frame[frame]) for frame in frames}
        for start in np.flatnonzero(index.is_key):
            stop = next((key for key in np.flatnonzero(index.is_key) if key > start), len(index.packet_pts))
            inside = [packet for packet in packets if start <= packet < stop]
            if inside:
                needed = range(start, max(inside) + 1)
                expected += sum(not index.is_droppable[p] or p in packets for p in needed)
        counting.decoded = 0
        decode_frames(index, frames, num_threads, lambda number, frame: None)
        assert counting.decoded == expected == sum(run.num_decoded for run in plan_runs(index, frames))


def test_dropping_saves_a_third_where_encoders_make_b_frames(videos):
    (run,) = plan_runs(index_video(videos["h264_bframes.mp4"]), [14])
    assert run.num_decoded <= 0.67 * (run.stop - run.start)


def test_nothing_refers_to_a_dropped_packet(videos, truths):
    """All of them are left out: every other frame stays the same."""
    for name in ("h264_open_gop.mp4", "hevc_layers.ts", "mpeg4.avi", "av1.mp4"):
        index = index_video(videos[name])
        kept = [f for f, packet in enumerate(index.packet_of_frame) if not index.is_droppable[packet]]
        assert np.array_equal(read_frames(videos[name], kept), truths[name][kept])


def test_every_frame_is_delivered_once(videos):
    seen: list[int] = []
    decode_frames(
        index_video(videos["h264_open_gop.mp4"]), [5, 80, 5, 41], 3, lambda number, frame: seen.append(number)
    )
    assert sorted(seen) == [5, 41, 80]


@pytest.mark.parametrize("indices", [[NUM_FRAMES], [-1], [0, 500]])
def test_an_index_the_video_does_not_have_is_an_error(videos, indices):
    for name in ("vp9.webm", "hevc.mp4", "h264_raw.h264"):
        with pytest.raises(VideoDecodeError, match=f"asked for, it has {NUM_FRAMES}"):
            read_frames(videos[name], indices)


# ------------------------------------------------------------------------------------------------------------ damage


def overwrite_packet(source: str, target: Path, number: int) -> str:
    """A copy whose packet `number` (decoding order) is zeros from its middle on."""
    with av.open(source) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        start, size = packet.pos, packet.size
    data = bytearray(Path(source).read_bytes())
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    target.write_bytes(data)
    return str(target)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_damage_spoils_what_follows_in_its_group_and_nothing_else(tmp_path, videos, truths, num_threads):
    """libavcodec would hide the damage in grey: no wanted frame may come back different from the intact file."""
    name = "h264_bframes.mp4"
    path = overwrite_packet(videos[name], tmp_path / "damaged.mp4", 30)  # the keyframe of the third group
    for index in (*range(0, 30, 5), *range(45, NUM_FRAMES, 5)):
        assert np.array_equal(read_frames(path, [index], num_threads)[0], truths[name][index])
    for index in range(30, 45):
        with pytest.raises(VideoDecodeError, match=f"corrupt: frame {index} cannot be decoded: .* damaged"):
            read_frames(path, [0, index, 89], num_threads)


def test_a_file_that_changes_after_its_index_was_made_is_an_error(videos, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(Path(videos["h264_bframes.mp4"]).read_bytes())
    index = index_video(str(path))
    path.write_bytes(Path(write_video(tmp_path / "b.mp4", Kind("libx264", {"g": "7"}), 40)).read_bytes())
    with pytest.raises(VideoDecodeError, match="the file has changed"):
        decode_frames(index, [60], 1, lambda number, frame: None)
    path.unlink()
    with pytest.raises(VideoDecodeError, match="cannot be read: No such file"):
        decode_frames(index, [60], 2, lambda number, frame: None)


def test_several_videos_at_once_share_the_threads(videos, truths):
    """Six calls on two threads: never more than two decode, and every frame is right."""
    slots, lock, busy, most = threading.Semaphore(2), threading.Lock(), set(), 0

    def decode(name: str) -> None:
        def deliver(number: int, frame: av.VideoFrame) -> None:
            nonlocal most
            with lock:
                busy.add(threading.get_ident())
                most = max(most, len(busy))
            assert np.array_equal(frame.to_ndarray(format="rgb24"), truths[name][number])
            with lock:
                busy.discard(threading.get_ident())

        decode_frames(index_video(videos[name]), list(range(0, 90, 5)), 2, deliver, slots)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode, [*CLOSED_GOPS, "mjpeg.mkv", "av1.mp4", "mpeg2.mpg"]))
    assert most <= 2


def test_a_failure_in_one_thread_reaches_the_caller_as_it_is(videos):
    def deliver(number: int, frame: av.VideoFrame) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        decode_frames(index_video(videos["mjpeg.mkv"]), list(range(90)), 2, deliver)


def test_open_files_and_threads_do_not_grow(videos):
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    read_frames(videos["hevc.mp4"], [0, 50], 2)
    files, threads = num_open(), threading.active_count()
    for _ in range(20):
        read_frames(videos["hevc.mp4"], [0, 50], 2)
    assert (num_open(), threading.active_count()) == (files, threads)
