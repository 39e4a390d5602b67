# SPDX-License-Identifier: Apache-2.0
"""Small videos of every kind that the decoder has to get right, written with PyAV, and their plain full decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, NUM_FRAMES = 64, 96, 90
_OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=6:scenecut=0:bframes=3:b-pyramid=2"}
_VPX = {"g": "15", "deadline": "realtime", "cpu-used": "8"}
_HIDDEN = {
    "g": "30",
    "auto-alt-ref": "1",
    "lag-in-frames": "12",
    "arnr-maxframes": "5",
    "cpu-used": "2",
    "deadline": "good",
    "b": "60k",
}


@dataclass(frozen=True)
class Kind:
    """How to encode one file."""

    codec: str
    options: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (WIDTH, HEIGHT)
    muxer: str | None = None


KINDS = {
    "h264_bframes.mp4": Kind("libx264", {"g": "15", "bf": "3"}),
    "h264_one_gop.mp4": Kind("libx264", {"g": "300", "bf": "3"}),
    "h264_open_gop.mp4": Kind("libx264", _OPEN_GOP),
    "h264_open_gop.ts": Kind("libx264", _OPEN_GOP),
    "h264_vfr.mkv": Kind("libx264", {"g": "15"}),
    "h264_vfr.mp4": Kind("libx264", {"g": "15", "bf": "2"}),
    "h264_refresh.mp4": Kind("libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "h264_10bit.mkv": Kind("libx264", {"g": "15"}, "yuv420p10le"),
    "h264_444.mp4": Kind("libx264", {"g": "15"}, "yuv444p"),
    "h264_interlaced.ts": Kind("libx264", {"g": "15", "flags": "+ilme+ildct"}),
    "h264_raw.h264": Kind("libx264", {"g": "15", "bf": "2"}),
    "h264_bframes.avi": Kind("libx264", {"g": "15", "bf": "3"}),
    "hevc.mp4": Kind("libx265", {"x265-params": "keyint=12:open-gop=0:log-level=none"}),
    "hevc_open_gop.mkv": Kind("libx265", {"x265-params": "keyint=12:min-keyint=6:open-gop=1:bframes=4:log-level=none"}),
    "hevc_layers.ts": Kind("libx265", {"x265-params": "keyint=16:temporal-layers=3:bframes=3:log-level=none"}),
    "hevc_10bit.mp4": Kind("libx265", {"x265-params": "keyint=12:log-level=none"}, "yuv420p10le"),
    "vp8.webm": Kind("libvpx", _VPX),
    "vp8_hidden.webm": Kind("libvpx", _HIDDEN),
    "vp9.webm": Kind("libvpx-vp9", _VPX),
    "vp9_hidden.webm": Kind("libvpx-vp9", _HIDDEN),
    "vp9_odd.mp4": Kind("libvpx-vp9", _VPX, size=(95, 63)),
    "av1.mp4": Kind("libsvtav1", {"g": "15", "preset": "12", "svtav1-params": "lookahead=0"}),
    "mpeg4.mp4": Kind("mpeg4", {"g": "15", "bf": "2"}),
    "mpeg4.avi": Kind("mpeg4", {"g": "15", "bf": "2"}),
    "mpeg2.ts": Kind("mpeg2video", {"g": "12", "bf": "2", "b": "400k"}),
    "mpeg2.mpg": Kind("mpeg2video", {"g": "12", "bf": "2", "b": "400k"}),
    "mjpeg.avi": Kind("mjpeg", {}, "yuvj420p"),
    "mjpeg.mkv": Kind("mjpeg", {}, "yuvj420p"),
}


def picture(index: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([x * 2 + index * 3, y * 3 + index * 5, x + y + index * 7], -1).astype(np.uint8)


def frame_time(index: int, vfr: bool) -> int:
    """In 1/1000 s. Variable: every third frame stays on the screen three times as long."""
    return (index + index // 3 * 2) * 40 if vfr else index * 40


def write_video(
    path: str | Path, kind: Kind, num_frames: int = NUM_FRAMES, container_options: dict[str, str] | None = None
) -> str:
    with av.open(str(path), "w", format=kind.muxer, options=container_options or {}) as container:
        stream = container.add_stream(kind.codec, rate=25, options=kind.options)
        (stream.width, stream.height), stream.pix_fmt = kind.size, kind.pix_fmt
        stream.codec_context.thread_count = 1  # else what it makes depends on the number of cores
        if kind.codec not in ("mpeg4", "mpeg2video", "mjpeg"):  # those take a rate only
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, kind.size), format="rgb24")
            frame.pts, frame.time_base = frame_time(index, "vfr" in str(path)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def write_kind(folder: Path, name: str) -> str:
    return write_video(folder / name, KINDS[name])


def copy_packets(source: str, target: str | Path, start: int, num_skipped: int, options: dict[str, str]) -> str:
    """The file without its first `num_skipped` packets, its clock set back so that `start` ms is zero."""
    with av.open(source) as given, av.open(str(target), "w", options=options) as container:
        template = given.streams.video[0]
        stream = container.add_stream_from_template(template)
        shift = int(start / 1000 / template.time_base)
        for number, packet in enumerate(packet for packet in given.demux(template) if packet.size):
            if number >= num_skipped:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                container.mux(packet)
    return str(target)


def full_decode(path: str, **how: object) -> np.ndarray:
    """uint8 [F, height, width, 3]: every frame from the first to the last, by PyAV alone."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24", **how) for frame in container.decode(video=0)])


def turned(folder: Path, degrees: int) -> str:
    """The first 20 pictures, with a display matrix that turns them counterclockwise."""
    path = folder / f"turned_{degrees}.mp4"
    source = write_video(folder / "upright.mp4", Kind("libx264", {"g": "15"}), 20)
    with av.open(source) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return str(path)


def with_sound(picture: str, target: Path, codec: str, options: dict[str, str] | None = None) -> str:
    """The pictures of a file and four seconds of a tone, in the order of their times as muxers write them."""
    rate = 48_000 if codec != "wmav2" else 44_100
    with av.open(picture) as given, av.open(str(target), "w", options=options or {}) as container:
        film = container.add_stream_from_template(given.streams.video[0])
        sound = container.add_stream(codec, rate=rate, layout="mono")
        sound.bit_rate = 64_000
        sound.codec_context.open()
        samples = (np.sin(np.arange(4 * rate) / 30) * 20_000).astype(np.int16)[None]
        tone = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(sound.codec_context.format, "mono", rate, sound.codec_context.frame_size or 1024)
        frames = [*resampler.resample(tone), *resampler.resample(None), None]
        packets = [packet for frame in frames for packet in sound.encode(frame)]
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = film
                packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return str(target)


def with_cover(picture: str, target: Path) -> str:
    """The same film and a cover picture, which stands first."""
    frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24").reformat(format="yuvj420p")
    with av.open(picture) as given, av.open(str(target), "w") as container:
        still = container.add_stream("mjpeg", rate=25)
        still.width, still.height, still.pix_fmt = 32, 32, "yuvj420p"
        still.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream_from_template(given.streams.video[0])
        container.mux(still.encode(frame))
        container.mux(still.encode(None))
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = film
                container.mux(packet)
    return str(target)
