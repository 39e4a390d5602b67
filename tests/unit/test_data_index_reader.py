# SPDX-License-Identifier: Apache-2.0
"""What a file holds, and every kind of bad file against its reason."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest

from data.video.packets import PacketParser
from data.video.pixels import CpuVideoDecoder
from megatron_rl.errors import VideoDecodeError
from tests.video_files import HEIGHT, KINDS, NUM_FRAMES, WIDTH, Kind, frame_time, turned, write_kind, write_video

NAMES = ["h264_vfr.mkv", "h264_vfr.mp4", "h264_open_gop.ts", "hevc.mp4", "vp9_odd.mp4", "mpeg4.avi", "vp8.webm"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_kind(folder, name) for name in NAMES}


@pytest.fixture(scope="module")
def decoder() -> CpuVideoDecoder:
    return CpuVideoDecoder(1)


@pytest.mark.parametrize("name", NAMES)
def test_probe(videos, decoder, name):
    info = decoder.probe(videos[name])
    assert ((info.width, info.height), info.num_frames) == (KINDS[name].size, NUM_FRAMES)
    assert info.codec in name
    expected = [frame_time(index, "vfr" in name) / 1000 for index in range(NUM_FRAMES)]
    assert np.allclose(info.timestamps, expected, atol=1e-3)
    if "vfr" not in name:
        assert info.average_fps == pytest.approx(25, rel=0.02) and info.rate == info.average_fps


def test_a_changed_file_is_read_again(tmp_path, decoder):
    path = write_video(tmp_path / "a.mp4", Kind("libx264"), 10)
    assert decoder.probe(path).num_frames == 10
    write_video(path, Kind("libx264"), 20)
    os.utime(path, ns=(1, 1))
    assert decoder.probe(path).num_frames == 20


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_turned_video_has_the_size_that_is_shown(tmp_path, decoder, degrees):
    info = decoder.probe(turned(tmp_path, degrees))
    assert (info.width, info.height) == ((WIDTH, HEIGHT) if degrees % 180 == 0 else (HEIGHT, WIDTH))


def test_a_slanted_video_is_refused(tmp_path, decoder):
    with pytest.raises(VideoDecodeError, match="multiple of 90 degrees"):
        decoder.probe(turned(tmp_path, 30))


# ------------------------------------------------------------------------------------------------- bytes of a packet


@pytest.mark.parametrize(
    ("codec", "data", "layer"),
    [
        ("h264", "00000003 41 9a 00", None),  # nal_ref_idc 2
        ("h264", "00000002 09 10 00000003 01 9a 00", 0),  # delimiter, then a slice with nal_ref_idc 0
        ("h264", "00000003 01 9a 00 00000003 41 9a 00", None),  # two slices, one of them referred to
        ("hevc", "00000003 02 01 00", None),  # TRAIL_R
        ("hevc", "00000003 00 01 00", 0),  # TRAIL_N, lowest sub-layer
        ("hevc", "00000003 00 03 00", 2),  # TRAIL_N, third sub-layer
        ("hevc", "00000003 26 01 00", None),  # IDR
        ("mpeg4", "000001b6 90 00", 0),  # B
        ("mpeg4", "000001b6 50 00", None),  # P
        ("mpeg4", "000001b6 50 00 000001b6 90 00", None),  # packed: P and B in one packet
        ("mpeg2video", "00000100 00 18 00", 0),  # B
        ("mpeg2video", "00000100 00 10 00", None),  # P
        ("vp9", "86 00 40 92", None),
    ],
)
def test_which_pictures_nothing_refers_to(codec, data, layer):
    extradata = {"h264": b"\1abc\xff" + b"0" * 9, "hevc": b"\1" + b"0" * 20 + b"\3" + b"0" * 9}.get(codec)
    assert PacketParser(codec, extradata).sublayer(memoryview(bytes.fromhex(data))) == layer
    if codec in ("h264", "hevc"):  # the same with start codes
        annex_b = bytes.fromhex(data).replace(b"\0\0\0\3", b"\0\0\0\1").replace(b"\0\0\0\2", b"\0\0\0\1")
        assert PacketParser(codec, None).sublayer(memoryview(annex_b)) == layer


@pytest.mark.parametrize(
    ("codec", "data", "shown"),
    [
        ("vp8", "10 02 00 9d 01 2a", True),
        ("vp8", "01 02 00", False),  # an alternative reference
        ("vp9", "86 00 40 92", True),
        ("vp9", "84 00 40 92", False),
        ("vp9", "88 00", True),  # show_existing_frame
        ("vp9", "84 00 40 c0", True),  # superframe: a hidden picture and a shown one
        ("h264", "00000003 41 9a 00", True),
    ],
)
def test_which_packets_show_a_picture(codec, data, shown):
    assert PacketParser(codec, None).is_shown(memoryview(bytes.fromhex(data))) is shown


# --------------------------------------------------------------------------------------------------------- bad files


def cut(source: str, target: Path, fraction: float) -> str:
    data = Path(source).read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return str(target)


def write_audio(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for number in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def bad_file(kind: str, folder: Path, videos: dict[str, str]) -> str:
    target = folder / f"{kind}.mp4"
    if kind == "empty":
        target.touch()
    elif kind in ("text", "text_txt"):
        target = target.with_suffix(".txt" if kind == "text_txt" else ".mp4")
        target.write_text("no video at all\n" * 200)
    elif kind == "audio_only":
        write_audio(target)
    elif kind == "moov_lost":
        cut(videos["hevc.mp4"], target, 0.7)
    elif kind == "cut_mp4":
        how = {"movflags": "faststart"}
        cut(write_video(folder / "w.mp4", Kind("libx264", {"g": "15"}), container_options=how), target, 0.6)
    elif kind == "cut_webm":
        return cut(videos["vp8.webm"], folder / "cut.webm", 0.5)
    elif kind == "first_keyframe":
        with av.open(videos["hevc.mp4"]) as container:
            packet = next(container.demux(video=0))
        data = bytearray(Path(videos["hevc.mp4"]).read_bytes())
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
        target.write_bytes(data)
    elif kind == "folder":
        target.mkdir()
    return str(target)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("empty", "0 bytes"),
        ("text", "not a readable video"),
        ("text_txt", "a text file"),
        ("audio_only", "no video stream .only audio"),
        ("moov_lost", "not a readable video"),
        ("cut_mp4", "truncated: the data ends after"),
        ("cut_webm", "truncated: the data ends after"),
        ("first_keyframe", "corrupt: the first keyframe cannot be decoded"),
    ],
)
def test_bad_files_are_refused_at_the_probe_with_their_reason(kind, reason, tmp_path, videos, decoder):
    path = bad_file(kind, tmp_path, videos)
    with pytest.raises(VideoDecodeError, match=reason) as refused:
        decoder.probe(path)
    assert refused.value.source == path
    with pytest.raises(VideoDecodeError, match=reason):
        decoder.decode(path, [0], (28, 28))
