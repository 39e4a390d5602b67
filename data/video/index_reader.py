# SPDX-License-Identifier: Apache-2.0
"""One pass over the packets of a video file -> VideoIndex; and every kind of bad file -> VideoDecodeError.

Only one keyframe is decoded. Files whose packets have no usable timestamps are decoded through instead, to count.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import av
import numpy as np

from data.video.index import VideoHeader, VideoIndex
from data.video.packets import PacketParser
from megatron_rl.errors import VideoDecodeError

# Less than this missing at the end is how some muxers round, not a cut file.
_TRUNCATION_SECONDS, _TRUNCATION_FRACTION = 1.0, 0.02
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_IDENTITY = (1, 0, 0, 1)


def read_index(path: str) -> VideoIndex:
    """The index of a file. Raises VideoDecodeError for one that is no whole, readable video."""
    try:
        with av.open(path) as container:
            return _read(path, container, _video_stream(path, container))
    except (av.FFmpegError, UnicodeDecodeError, OSError) as error:
        raise VideoDecodeError(
            path, f"not a readable video (cut, damaged or another kind of file): {cause(error)}"
        ) from error


def cause(error: Exception) -> str:
    """An error in FFmpeg's own words, without the number that PyAV puts before them."""
    if isinstance(error, UnicodeDecodeError):
        return "text in its header is garbled"
    return error.strerror if isinstance(error, av.FFmpegError | OSError) and error.strerror else str(error)


def demux(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """The stream's packets that hold data, to the end of the file.

    PyAV 18 ends with an IndexError where a damaged file brings up streams that its header did not name: at the end it
    goes through all streams of libavformat, and has objects only for those of the header. And a generator of PyAV that
    is dropped half-way without being closed keeps a few hundred bytes for good.
    """
    with closing(cast("Generator[av.Packet]", container.demux(stream))) as packets:
        while True:
            try:
                packet = next(packets, None)
            except IndexError:
                return
            if packet is None:
                return
            if packet.size and packet.stream is stream:
                yield packet


def _video_stream(path: str, container: av.container.InputContainer) -> av.VideoStream:
    if container.format.name == "tty":  # FFmpeg plays text as a film of a terminal
        raise VideoDecodeError(path, "a text file")
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        raise VideoDecodeError(path, f"no video stream{f' (only {kinds})' if kinds else ''}")
    stream = container.streams.video[0]
    if stream.codec_context is None or stream.codec_context.width == 0:
        raise VideoDecodeError(path, "unknown codec or picture size (damaged file?)")
    return stream


class _Packets:
    """The columns of the index while they are read."""

    def __init__(self) -> None:
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.is_key: list[bool] = []
        self.is_shown: list[bool] = []
        self.sublayer: list[int | None] = []
        self.end = 0
        self.cut = False

    def add(self, packet: av.Packet, parser: PacketParser) -> None:
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.is_key.append(packet.is_keyframe)
        data = memoryview(packet)
        self.is_shown.append(not packet.is_discard and parser.is_shown(data))
        self.sublayer.append(0 if packet.is_disposable else parser.sublayer(data))
        self.cut = packet.is_corrupt
        if packet.pts is not None:
            self.end = max(self.end, packet.pts + (packet.duration or 0))


def _read(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> VideoIndex:
    context = stream.codec_context
    codec = context.codec.canonical_name
    parser = PacketParser(codec, context.extradata)
    packets = _Packets()
    first: av.VideoFrame | None = None
    for packet in demux(container, stream):
        packets.add(packet, parser)
        if packet.is_keyframe and first is None:
            first = _first_frame(path, packet)
    if not packets.pts or first is None:
        raise VideoDecodeError(path, "no keyframe" if packets.pts else "no video frames")
    time_base = float(stream.time_base or 0)
    missing = _stated_end(container, stream) - packets.end * time_base
    if packets.cut or missing > max(_TRUNCATION_SECONDS, _TRUNCATION_FRACTION * packets.end * time_base):
        raise VideoDecodeError(path, f"truncated: the data ends after {packets.end * time_base:.1f} s of video")
    rate = float(stream.average_rate or 0)
    header = VideoHeader(path, codec, first.width, first.height, time_base, rate, _display(path, first), _matrix(first))
    if all(packets.is_key) and None in packets.pts and None not in packets.dts:
        packets.pts = packets.dts  # nothing is reordered where every picture stands alone
    shown = [pts for pts, is_shown in zip(packets.pts, packets.is_shown, strict=True) if is_shown]
    made_up = (
        container.format.name == "avi" and context.has_b_frames and packets.pts == sorted(pts or 0 for pts in shown)
    )
    if None in packets.pts or len(set(shown)) != len(shown) or made_up:  # AVI knows the order of decoding only
        return _by_number(replace(header, average_fps=rate or 25.0, time_base=1 / (rate or 25.0)))
    return _assemble(header, packets)


def _first_frame(path: str, keyframe: av.Packet) -> av.VideoFrame | None:
    """Decode one keyframe for the size and the display matrix of what is shown."""
    context = keyframe.stream.codec_context
    try:
        frames = [*context.decode(keyframe), *context.decode(None)]
    except av.FFmpegError as error:
        raise VideoDecodeError(path, f"corrupt: the first keyframe cannot be decoded: {cause(error)}") from error
    context.flush_buffers()
    return frames[0] if frames else None


def _matrix(frame: av.VideoFrame) -> Literal["bt601", "bt709", "bt2020"]:
    """By the stream's tags (ITU-T H.273); BT.601 where there are none, as for everything built on libswscale."""
    by_tag: dict[int, Literal["bt709", "bt2020"]] = {1: "bt709", 9: "bt2020"}
    return by_tag.get(int(frame.colorspace), "bt601")


def _display(path: str, frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Signs (a, b, c, d) of the display matrix: frame point (x, y) is shown at (a x + c y, b x + d y)."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return _IDENTITY
    matrix = np.frombuffer(memoryview(data), np.int32)[[0, 1, 3, 4]]
    signs = tuple(int(sign) for sign in np.sign(matrix))
    if sorted(map(abs, signs)) != [0, 0, 1, 1] or abs(signs[0]) != abs(signs[3]):
        raise VideoDecodeError(path, "turned by an angle that is no multiple of 90 degrees; re-encode it upright")
    return signs  # type: ignore[return-value]


def _assemble(header: VideoHeader, packets: _Packets) -> VideoIndex:
    pts, is_key = np.asarray(packets.pts, np.int64), np.asarray(packets.is_key)
    is_shown = np.asarray(packets.is_shown)
    first_key = int(np.flatnonzero(is_key)[0])
    # Before the first keyframe, in the file or on the screen, stand pictures whose references are not in the file.
    is_shown &= (np.arange(len(pts)) >= first_key) & (pts >= pts[first_key])
    highest = max((layer for layer in packets.sublayer if layer is not None), default=0)
    if not is_shown.any():
        raise VideoDecodeError(header.path, "no video frames")
    shown = np.flatnonzero(is_shown)
    order = shown[np.argsort(pts[shown])]
    return VideoIndex(
        **asdict(header),
        pts=pts[order],
        packet_of_frame=order,
        packet_pts=pts,
        is_key=is_key,
        is_shown=is_shown,
        is_droppable=np.asarray([layer == highest for layer in packets.sublayer]) & ~is_key,
    )


def decode_all(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """Every frame, from the first to the last."""
    stream = container.streams.video[0]
    for packet in demux(container, stream):
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _by_number(header: VideoHeader) -> VideoIndex:
    """Count the frames by decoding all: raw streams, AVI with B-frames, repeated timestamps."""
    with av.open(header.path) as container:
        count = sum(1 for _ in decode_all(container))
    if not count:
        raise VideoDecodeError(header.path, "no video frames")
    numbers, yes = np.arange(count), np.ones(count, bool)
    return VideoIndex(
        **asdict(header),
        pts=numbers,
        packet_of_frame=numbers,
        packet_pts=numbers,
        is_key=numbers == 0,
        is_shown=yes,
        is_droppable=~yes,
        by_number=True,
    )


def _stated_end(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Second at which the headers say the video ends; 0 where they do not say. Other streams may be longer."""
    time_base = float(stream.time_base or 0)
    start = (stream.start_time or 0) * time_base
    if stream.duration is not None:
        return start + stream.duration * time_base
    if tag := stream.metadata.get("DURATION"):  # Matroska, WebM
        found = _CLOCK.fullmatch(tag.strip("\0"))
        if not found:
            raise VideoDecodeError(container.name, f"garbled: its header says DURATION={tag!r}")
        return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
    if container.duration is not None and len(container.streams) == 1:
        return start + container.duration / av.time_base
    return 0.0
