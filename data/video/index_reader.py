# SPDX-License-Identifier: Apache-2.0
"""One pass over the packets of a video file -> VideoIndex; and every kind of bad file -> VideoDecodeError.

Only one keyframe is decoded. Files whose timestamps do not tell the order of their pictures are decoded through, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import av
import numpy as np

from data.video.container import cause, demux, open_media, video_stream
from data.video.index import VideoHeader, VideoIndex
from data.video.packets import PacketParser
from data.video.timestamps import NEVER_REORDERED, ascending, order_of_pictures, tells_order
from data.video.whole_file import missing_bytes
from megatron_rl.errors import VideoDecodeError

# Less than this missing at the end is how some muxers round, not a cut file.
_TRUNCATION_SECONDS, _TRUNCATION_FRACTION = 1.0, 0.02
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_IDENTITY = (1, 0, 0, 1)
_DEFAULT_RATE = 25.0
_NO_RATE = 1000.0  # frames a second; from here on it is the ticks of a clock that the header counts


def read_index(path: str) -> VideoIndex:
    """The index of a file. Raises VideoDecodeError for one that is no whole, readable video."""
    try:
        with open_media(path) as container:
            return _read(path, container, video_stream(path, container))
    except (av.FFmpegError, UnicodeDecodeError, OSError) as error:
        raise VideoDecodeError(
            path, f"not a readable video (cut, damaged or another kind of file): {cause(error)}"
        ) from error


class _Packets:
    """The columns of the index while they are read, and where all streams of the file end."""

    def __init__(self) -> None:
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.is_key: list[bool] = []
        self.is_shown: list[bool] = []
        self.sublayer: list[int | None] = []
        self.end = 0.0
        self.end_of_all = 0.0
        self.cut = self.cut_of_all = False  # what came last is cut short

    def add(self, packet: av.Packet, parser: PacketParser) -> None:
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.is_key.append(packet.is_keyframe)
        data = memoryview(packet)
        self.is_shown.append(not packet.is_discard and parser.is_shown(data))
        self.sublayer.append(0 if packet.is_disposable else parser.sublayer(data))
        self.end = max(self.end, _end(packet))
        self.cut = packet.is_corrupt

    def see(self, packet: av.Packet) -> None:
        """A packet of any stream."""
        self.cut_of_all = packet.is_corrupt
        self.end_of_all = max(self.end_of_all, _end(packet))


def _end(packet: av.Packet) -> float:
    """Second up to which it is shown or heard."""
    return 0.0 if packet.pts is None else float((packet.pts + (packet.duration or 0)) * (packet.time_base or 0))


def _read(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> VideoIndex:
    context = stream.codec_context
    codec = context.codec.canonical_name
    parser = PacketParser(codec, context.extradata)
    packets = _Packets()
    first: av.VideoFrame | None = None
    opening: av.Packet | None = None
    for packet in demux(container):
        packets.see(packet)
        if packet.stream is not stream:
            continue
        packets.add(packet, parser)
        opening = opening or packet
        if packet.is_keyframe and first is None:
            first = _first_frame(path, packet)
    if opening is not None and not any(packets.is_key):  # a container without flags
        first = _first_frame(path, opening)
        first = first if first is not None and first.key_frame and not first.is_corrupt else None
        packets.is_key[0] = True
    if not packets.pts or first is None:
        raise VideoDecodeError(path, "no keyframe" if packets.pts else "no video frames")
    _check_whole(path, container, stream, packets)
    rate = float(stream.average_rate or 0)
    rate = rate if rate < _NO_RATE else 0.0
    time_base = float(stream.time_base or 0)
    header = VideoHeader(path, codec, first.width, first.height, time_base, rate, _display(path, first), _matrix(first))
    return _with_clock(header, packets, container.format.name == "avi" and context.has_b_frames)


def _check_whole(path: str, container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets) -> None:
    """Raise VideoDecodeError where headers or containers state more than the file holds."""
    stated, of_all = _stated_end(container, stream), 0.0
    if not stated and packets.end_of_all and container.duration is not None:  # of the longest stream
        of_all = (max(container.start_time or 0, 0) + container.duration) / av.time_base
    missing = max(
        promised - end - max(_TRUNCATION_SECONDS, _TRUNCATION_FRACTION * end)
        for promised, end in ((stated, packets.end), (of_all, packets.end_of_all))
    )
    num_bytes = missing_bytes(path)
    if packets.cut or packets.cut_of_all or missing > 0 or num_bytes:
        lacks = f", and {num_bytes:,} bytes that its container states are missing" if num_bytes else ""
        raise VideoDecodeError(path, f"truncated: the data ends after {packets.end:.1f} s of video{lacks}")


def _with_clock(header: VideoHeader, packets: _Packets, in_decoding_order: bool) -> VideoIndex:
    """The index, its times those of the file as far as they can be; `in_decoding_order`: the file's clock is one of
    decoding, as that of AVI is."""
    dts = [time for time in packets.dts if time is not None]
    shown = np.flatnonzero(packets.is_shown)
    if None in packets.pts:
        if len(dts) < len(packets.pts):
            return _by_number(header)
        packets.pts, in_decoding_order = packets.dts, not all(packets.is_key)
    times = np.asarray(packets.pts, np.int64)
    clock = np.asarray(packets.dts, np.int64) if len(dts) == len(times) else times
    steps = np.diff(times[shown])
    if header.codec in NEVER_REORDERED or all(packets.is_key):
        good, order = bool((steps > 0).all()), shown.tolist()
        in_decoding_order = False
    else:
        in_decoding_order = in_decoding_order and bool((steps >= 0).all())
        good = not in_decoding_order and dts == sorted(dts) and tells_order(times[shown])
        order = [] if good else order_of_pictures(header.path)
    if good:
        return _assemble(header, packets, times)
    made = ascending(np.sort(clock[order]) if in_decoding_order else times[order]) if order else None
    if made is None:
        return _by_number(header)
    packets.is_shown = np.isin(np.arange(len(times)), order).tolist()
    repaired = times.copy()
    repaired[order] = made
    return _assemble(header, packets, repaired)


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


def _assemble(header: VideoHeader, packets: _Packets, pts: np.ndarray) -> VideoIndex:
    """`pts` int64 [P]: those of the file, or what was made of them."""
    is_key = np.asarray(packets.is_key)
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
        packet_stamp=np.asarray(packets.pts, np.int64),
        is_key=is_key,
        is_shown=is_shown,
        is_droppable=np.asarray([layer == highest for layer in packets.sublayer]) & ~is_key,
    )


def decode_all(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """Every frame, from the first to the last."""
    stream = video_stream(container.name, container)
    for packet in demux(container, stream):
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _by_number(header: VideoHeader) -> VideoIndex:
    """Count the frames by decoding all: raw streams, and clocks that stand still."""
    rate = header.average_fps or _DEFAULT_RATE
    header = replace(header, average_fps=rate, time_base=1 / rate)
    with open_media(header.path) as container:
        count = sum(1 for _ in decode_all(container))
    if not count:
        raise VideoDecodeError(header.path, "no video frames")
    numbers, yes = np.arange(count), np.ones(count, bool)
    return VideoIndex(
        **asdict(header),
        pts=numbers,
        packet_of_frame=numbers,
        packet_pts=numbers,
        packet_stamp=numbers,
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
    return 0.0
