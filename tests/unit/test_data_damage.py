# SPDX-License-Identifier: Apache-2.0
"""Damaged files: an error with a reason, never a crash or a hang, no memory lost, and hardly ever a wrong picture."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from data.rows.manifest import Manifest
from data.video.container import demux
from data.video.index_store import index_video
from data.video.pixels import CpuVideoDecoder, read_frames
from megatron_rl.errors import VideoDecodeError
from tests.host_memory import allocated, give_back_freed
from tests.video_files import NUM_FRAMES, Kind, full_decode, write_kind, write_video

NAMES = [
    "h264_bframes.mp4", "h264_open_gop.ts", "h264_vfr.mkv", "h264_raw.h264", "hevc.mp4", "vp8.webm", "vp9.webm",
    "av1.mp4", "mpeg4.avi", "mjpeg.mkv",
]  # fmt: skip
NUM_MUTATED = 2000


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_kind(folder, name) for name in NAMES}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a file cut short, a wrong header, or a hole of zeros."""
    how, changed = rng.choice(["flip", "flip", "cut", "header", "hole"]), bytearray(data)
    if how == "cut":
        return bytes(changed[: rng.randrange(len(changed))])
    if how == "hole":
        start = rng.randrange(len(changed))
        changed[start : start + 64] = bytes(len(changed[start : start + 64]))
    for _ in range(rng.randrange(1, 30) if how == "flip" else 8 if how == "header" else 0):
        position = rng.randrange(len(changed) if how == "flip" else min(200, len(changed)))
        changed[position] ^= 1 << rng.randrange(8) if how == "flip" else rng.randrange(1, 256)
    return bytes(changed)


@pytest.mark.timeout(300)
def test_mutated_files_give_frames_or_a_reason(videos, tmp_path):
    """2,000 files. Nothing but VideoDecodeError may come out; a crash or a hang would end the test run."""
    reasons: Counter[str] = Counter()
    data = {name: Path(path).read_bytes() for name, path in videos.items()}
    for seed in range(NUM_MUTATED):
        rng, name = random.Random(seed), NAMES[seed % len(NAMES)]
        path = tmp_path / f"{seed}{Path(name).suffix}"
        path.write_bytes(mutate(data[name], rng))
        try:
            num_frames = index_video(str(path)).num_frames
            frames = read_frames(str(path), [rng.randrange(num_frames) for _ in range(3)], 1 + seed % 2)
            assert frames.dtype == np.uint8 and len(frames) == 3
        except VideoDecodeError as error:
            assert error.source == str(path)
            reasons[error.reason.split(":")[0]] += 1
        path.unlink()
    assert sum(reasons.values()) > NUM_MUTATED / 4
    assert all(len(reason) >= 7 and "Errno" not in reason for reason in reasons), dict(reasons)


@pytest.mark.timeout(300)
def test_memory_and_files_do_not_grow_over_a_thousand_decodes(videos, tmp_path):
    """Good and damaged files in turn."""
    damaged = tmp_path / "damaged.mp4"
    content = bytearray(Path(videos["h264_bframes.mp4"]).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    damaged.write_bytes(content)
    decoder, process = CpuVideoDecoder(2), psutil.Process()
    paths = [videos["hevc.mp4"], videos["vp9.webm"], str(damaged), videos["h264_open_gop.ts"]]

    def decode(count: int) -> None:
        for number in range(count):
            path = paths[number % len(paths)]
            try:
                decoder.decode(path, [number % NUM_FRAMES, 89], (28, 28))
            except VideoDecodeError:
                assert path == str(damaged)

    decode(200)
    give_back_freed()
    before, files = process.memory_info().rss, process.num_fds()
    decode(1000)
    give_back_freed()
    assert process.memory_info().rss - before < 4 << 20
    assert process.num_fds() == files


def test_a_file_read_in_part_leaves_no_memory_behind(videos):
    """PyAV's own generator does, if it is dropped before its end; `demux` need not close it once this fails."""
    path = videos["h264_open_gop.ts"]

    def left_behind(read) -> float:
        """Bytes each time."""
        for number in range(1100):
            if number == 100:
                before = allocated()
            with av.open(path) as container:
                next(read(container, container.streams.video[0]))
        return (allocated() - before) / 1000

    assert left_behind(demux) < 40
    assert left_behind(lambda container, stream: container.demux(stream)) > 80


def test_damaged_h264_hardly_ever_gives_a_wrong_picture(tmp_path):
    """400 flipped bytes in 300 frames of 320x240, frames asked for one by one: at most 1 % of the damaged are wrong."""
    how = {"g": "60", "bf": "3", "preset": "ultrafast", "x264-params": "cabac=1", "threads": "1"}
    source = write_video(tmp_path / "whole.mp4", Kind("libx264", how, size=(320, 240)), 300)
    truth, data = full_decode(source), Path(source).read_bytes()
    outcomes: Counter[str] = Counter()
    for seed in range(3):
        rng, damaged = random.Random(seed), bytearray(data)
        for _ in range(400):
            damaged[rng.randrange(len(data) // 20, len(data) * 17 // 20)] ^= rng.randrange(1, 256)
        path = tmp_path / f"damaged_{seed}.mp4"
        path.write_bytes(damaged)
        for frame in range(0, 300, 3):
            try:
                same = np.array_equal(read_frames(str(path), [frame])[0], truth[frame])
                outcomes["same" if same else "wrong"] += 1
            except VideoDecodeError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["wrong"] <= 0.01 * (outcomes["wrong"] + outcomes["refused"]), outcomes


# ---------------------------------------------------------------------------------------------------- sha256 manifest


def listed(folder: Path, *paths: str) -> str:
    import hashlib

    lines = [
        f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()}  {os.path.relpath(path, folder)}" for path in paths
    ]
    manifest = folder / "sha256.txt"
    manifest.write_text("\n".join(lines) + "\n")
    return str(manifest)


def test_a_manifest_finds_a_single_flipped_bit(videos, tmp_path):
    path = tmp_path / "a.webm"
    data = bytearray(Path(videos["vp9.webm"]).read_bytes())
    path.write_bytes(data)
    manifest = Manifest(listed(tmp_path, str(path)))
    manifest.check(str(path))
    data[-100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(VideoDecodeError, match="damaged or changed: its sha256 is"):
        manifest.check(str(path))
    path.unlink()
    with pytest.raises(VideoDecodeError, match="No such file"):
        manifest.check(str(path))


def test_a_manifest_refuses_what_it_does_not_list_and_names_its_own_faults(videos, tmp_path):
    manifest = listed(tmp_path, videos["vp9.webm"])
    with pytest.raises(VideoDecodeError, match=r"not listed in data\.manifest="):
        Manifest(manifest).check(videos["hevc.mp4"])
    Path(manifest).write_text("0" * 64 + "  a.mp4\nnonsense\n")
    with pytest.raises(ValueError, match=r"^data\.manifest=.*: line 2 is not"):
        Manifest(manifest)
