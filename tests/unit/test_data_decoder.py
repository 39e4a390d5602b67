# SPDX-License-Identifier: Apache-2.0
"""Decoded frames against a full, sequential decode of the same file; every kind of bad file against its reason."""

from __future__ import annotations

import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from data.dali import DaliVideoDecoder
from data.decoder import read_frames, scan
from megatron_rl.errors import VideoDecodeError

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 90
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=6:scenecut=0:bframes=3:b-pyramid=2"}
VP9 = {"g": "15", "deadline": "realtime", "cpu-used": "8"}
FILES = {
    "h264_bframes.mp4": ("libx264", {"g": "15", "bf": "3"}),
    "h264_open_gop.mp4": ("libx264", OPEN_GOP),
    "h264_open_gop.ts": ("libx264", OPEN_GOP),
    "h264_vfr.mkv": ("libx264", {"g": "15"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=12:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", VP9),
    "vp8.webm": ("libvpx", VP9),
}
CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})


def picture(index: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 2 + index * 3, y * 3 + index * 5, x + y + index * 7], -1).astype(np.uint8)


def frame_time(index: int, vfr: bool) -> int:
    """In 1/1000 s. Variable: every third frame stays on the screen three times as long."""
    return (index + index // 3 * 2) * 40 if vfr else index * 40


def write_video(path, codec, options, num_frames=NUM_FRAMES, container_options=None):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = frame_time(index, "vfr" in str(path)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def sequential_decode(path: str) -> np.ndarray:
    """Every frame from the first to the last with PyAV alone; the colour settings (bilinear, BT.601) as numbers."""
    with av.open(path) as container:
        return np.stack(
            [
                frame.reformat(
                    format="rgb24", src_colorspace=5, dst_colorspace=5, interpolation=2 | 0x2000 | 0x40000
                ).to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def torch_resize(frames: np.ndarray, size_hw) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, size_hw, mode="bicubic", antialias=True)
    return resized.clamp(0, 255)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, *how) for name, how in FILES.items()}


@pytest.fixture(scope="module")
def decoder():
    return DaliVideoDecoder("cpu", 1, CPU_CODECS)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_frames_equal_a_sequential_decode(videos, name, num_threads):
    truth = sequential_decode(videos[name])
    assert len(truth) == NUM_FRAMES == len(scan(videos[name]).pts)
    order = np.random.default_rng(0).permutation(NUM_FRAMES)[:25].tolist()
    for indices in (order, [order[0], *order[:3]], [NUM_FRAMES - 1], [0], range(0, NUM_FRAMES, 7)):
        assert np.array_equal(read_frames(videos[name], list(indices), num_threads), truth[list(indices)])


def test_the_test_videos_are_what_they_claim(videos):
    """Open groups must hold pictures shown before their keyframe, else seeking is not put to the test."""
    with av.open(videos["h264_open_gop.mp4"]) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [n for n, p in enumerate(packets) if p.is_keyframe]
    assert len(keys) > 4
    assert any(packets[n + 1].pts < packets[n].pts for n in keys[1:-1])


@pytest.mark.parametrize("name", FILES)
def test_probe(videos, decoder, name):
    info = decoder.probe(videos[name])
    assert (info.width, info.height, info.num_frames) == (WIDTH, HEIGHT, NUM_FRAMES)
    assert info.codec in name
    expected = [frame_time(index, "vfr" in name) / 1000 for index in range(NUM_FRAMES)]
    assert np.allclose(info.timestamps, expected, atol=1e-3)


@pytest.mark.parametrize("size_hw", [(28, 28), (56, 84), (112, 140)])
@pytest.mark.parametrize("name", FILES)
def test_resized_frames_are_torchs_antialiased_bicubic(videos, decoder, name, size_hw):
    """Tolerance: mean 0.28, of which rounding to uint8 makes 0.25; max 6, at pixels on sharp edges.

    Bilinear, or bicubic without antialiasing, would give a mean above 0.31 and a max above 7 at each of these sizes.
    """
    indices = [40, 3, 3, 89, 0]
    frames = decoder.decode(videos[name], indices, size_hw)
    assert frames.dtype == torch.uint8 and frames.shape == (5, 3, *size_hw)
    expected = torch_resize(sequential_decode(videos[name])[indices], size_hw)
    error = (frames.float() - expected).abs()
    assert error.mean() <= 0.28 and error.max() <= 6


@pytest.mark.parametrize("name", ["vp9.webm", "vp8.webm"])
def test_both_sources_give_the_same_picture(videos, decoder, name):
    every = list(range(NUM_FRAMES))
    assert decoder._is_native(scan(videos[name]), every)
    by_dali = decoder.decode(videos[name], every, (56, 84)).float()
    by_pyav = DaliVideoDecoder("cpu", 1, frozenset()).decode(videos[name], every, (56, 84)).float()
    assert (by_dali - by_pyav).abs().max() <= 1.0


def test_a_clip_in_several_chunks_equals_one_in_one(videos, decoder, monkeypatch):
    indices = [70, *range(0, 90, 4), 70]
    for name in ("h264_open_gop.mp4", "vp9.webm"):
        whole = decoder.decode(videos[name], indices, (56, 56))
        monkeypatch.setattr("data.dali._PYAV_CHUNK_BYTES", 5 * HEIGHT * WIDTH * 3)
        assert torch.equal(decoder.decode(videos[name], indices, (56, 56)), whole)
        monkeypatch.undo()


def test_dali_decodes_only_where_seeking_saves_little(videos, decoder):
    vp9, h264 = scan(videos["vp9.webm"]), scan(videos["h264_bframes.mp4"])
    assert decoder._is_native(vp9, [0, 1, 2])
    assert not decoder._is_native(vp9, [0, NUM_FRAMES - 1])
    assert not decoder._is_native(h264, [0, 1, 2])


def test_results_survive_later_calls(videos, decoder):
    first = decoder.decode(videos["vp8.webm"], [0, 1], (28, 28))
    copy = first.clone()
    for start in range(2, 12, 2):
        decoder.decode(videos["vp8.webm"], [start, start + 1], (28, 28))
    assert torch.equal(first, copy)


def test_a_changed_file_is_read_again(tmp_path, decoder):
    path = write_video(tmp_path / "a.mp4", "libx264", {}, num_frames=10)
    assert decoder.probe(path).num_frames == 10
    write_video(path, "libx264", {}, num_frames=20)
    os.utime(path, ns=(1, 1))
    assert decoder.probe(path).num_frames == 20


def cut(source: str, target, fraction: float) -> str:
    data = open(source, "rb").read()
    target.write_bytes(data[: int(len(data) * fraction)])
    return str(target)


def write_audio(path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for number in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def bad_file(kind: str, folder, videos) -> str:
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
        whole = write_video(folder / "w.mp4", "libx264", {"g": "15"}, container_options={"movflags": "faststart"})
        cut(whole, target, 0.6)
    elif kind == "cut_webm":
        return cut(videos["vp9.webm"], folder / "cut.webm", 0.5)
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
    ],
)
def test_bad_files_are_refused_at_the_probe_with_their_reason(kind, reason, tmp_path, videos, decoder):
    path = bad_file(kind, tmp_path, videos)
    with pytest.raises(VideoDecodeError, match=reason) as refused:
        decoder.probe(path)
    assert refused.value.source == path
    with pytest.raises(VideoDecodeError, match=reason):
        decoder.decode(path, [0], (28, 28))


def overwrite_packet(source: str, target, number: int) -> str:
    """A copy whose packet `number` (decoding order) is zeros from its middle on."""
    with av.open(source) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        start, size = packet.pos, packet.size
    data = bytearray(open(source, "rb").read())
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    target.write_bytes(data)
    return str(target)


def test_damage_spoils_what_follows_in_its_group_and_nothing_else(tmp_path, videos, decoder):
    """libavcodec would hide the damage in grey: no wanted frame may come back different from the intact file."""
    source = videos["h264_bframes.mp4"]
    truth = sequential_decode(source)
    path = overwrite_packet(source, tmp_path / "damaged.mp4", 30)  # the keyframe of the third group
    for index in (*range(0, 30, 5), *range(45, NUM_FRAMES, 5)):
        assert np.array_equal(read_frames(path, [index])[0], truth[index])
    for index in (30, 37, 44):
        with pytest.raises(VideoDecodeError, match="corrupt"):
            decoder.decode(path, [0, index], (28, 28))


def test_damage_in_what_dali_decodes_is_an_error_and_the_decoder_goes_on(tmp_path, videos, decoder):
    data = bytearray(open(videos["vp9.webm"], "rb").read())
    with av.open(videos["vp9.webm"]) as container:
        packet = [p for p in container.demux(video=0) if p.size][15]
    start = data.find(bytes(packet))
    data[start : start + 3] = b"\xff\xff\xff"
    path = tmp_path / "damaged.webm"
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError, match="DALI cannot decode this vp9 video"):
        decoder.decode(str(path), list(range(20)), (28, 28))
    assert decoder.decode(videos["vp9.webm"], [0, 1, 2], (28, 28)).shape == (3, 3, 28, 28)


@pytest.mark.parametrize("indices", [[NUM_FRAMES], [-1], [0, 500]])
def test_an_index_the_video_does_not_have_is_an_error(videos, decoder, indices):
    for name in ("vp9.webm", "hevc.mp4"):
        with pytest.raises(VideoDecodeError, match=f"asked for, it has {NUM_FRAMES}"):
            decoder.decode(videos[name], indices, (28, 28))
