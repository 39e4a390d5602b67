# SPDX-License-Identifier: Apache-2.0
"""What a video file holds, from one pass over its packets; remembered until the file changes.

A frame is known by its presentation timestamp: counts and rates in headers are often wrong. Files whose packets have no
usable timestamps are read through once instead, and their frames are known by number (`VideoIndex.by_number`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import av
import numpy as np

from data.packets import PacketParser
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

if TYPE_CHECKING:
    from data.index_store import IndexStore

# Less than this missing at the end is how some muxers round, not a cut file.
_TRUNCATION_SECONDS, _TRUNCATION_FRACTION = 1.0, 0.02
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_NUM_REMEMBERED = 128  # a two-hour film takes 3 MB
_IDENTITY = (1, 0, 0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class VideoIndex:
    """Packets in decoding order (P of them) and frames in presentation order (F).

    `display` is the part (a, b, c, d) of the display matrix that turns and mirrors, as signs. Timestamps are in units
    of `time_base` seconds.
    """

    path: str
    codec: str
    width: int
    height: int
    time_base: float
    average_fps: float
    display: tuple[int, int, int, int]
    colour_matrix: Literal["bt601", "bt709", "bt2020"]
    pts: np.ndarray
    """int64 [F] of the shown frames, ascending."""
    packet_of_frame: np.ndarray
    """int64 [F] number of the packet that holds frame i."""
    packet_pts: np.ndarray
    """int64 [P]"""
    is_key: np.ndarray
    """bool [P]: decoding can start here."""
    is_shown: np.ndarray
    """bool [P]: gives a frame (neither hidden nor cut away by an edit list)."""
    is_droppable: np.ndarray
    """bool [P]: no other picture refers to it."""
    by_number: bool = False
    """No timestamps to go by: frame i is the i-th one that a decoder gives from the beginning."""

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) as shown, the display matrix applied."""
        return (self.height, self.width) if self.turn[0] else (self.width, self.height)

    @property
    def turn(self) -> tuple[bool, bool, bool]:
        """(rows and columns change places, then upside down, then left to right): how to show a stored picture."""
        a, b, c, d = self.display
        return (True, b < 0, c < 0) if a == 0 else (False, d < 0, a < 0)

    def info(self) -> VideoInfo:
        seconds = (self.pts - self.pts[0]) * self.time_base
        return VideoInfo(self.path, self.codec, *self.shown_size, tuple(seconds.tolist()), self.average_fps)

    def sorted_unique(self, frames: Iterable[int]) -> list[int]:
        """The frame numbers, each once. Raises VideoDecodeError for one that the video does not have."""
        wanted = sorted(set(frames))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise VideoDecodeError(
                self.path, f"frames {wanted[0]}..{wanted[-1]} asked for, it has {self.num_frames} (0 to the last)"
            )
        return wanted


def index_video(path: str, store: IndexStore | None = None) -> VideoIndex:
    """The index of a file, which `store` keeps. Raises VideoDecodeError for a file that is no whole, readable video."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise VideoDecodeError(path, f"cannot be read: {error.strerror}") from error
    if stat.st_size == 0:
        raise VideoDecodeError(path, "the file is empty (0 bytes)")
    return _index(path, (stat.st_size, stat.st_mtime_ns), store)


@functools.lru_cache(maxsize=_NUM_REMEMBERED)
def _index(path: str, state: tuple[int, int], store: IndexStore | None) -> VideoIndex:
    if store is None:
        return _pass_over(path)
    index = store.load(path, state)
    if index is None:
        index = _pass_over(path)
        store.save(index, state)
    return index


def _pass_over(path: str) -> VideoIndex:
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
    goes through all streams of libavformat, and has objects only for those of the header.
    """
    packets = container.demux(stream)
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


@dataclass(frozen=True, slots=True)
class _About:
    """What a VideoIndex says of the whole video."""

    path: str
    codec: str
    width: int
    height: int
    time_base: float
    average_fps: float
    display: tuple[int, int, int, int]
    colour_matrix: Literal["bt601", "bt709", "bt2020"]

    def index(
        self,
        pts: np.ndarray,
        packet_of_frame: np.ndarray,
        packet_pts: np.ndarray,
        is_key: np.ndarray,
        is_shown: np.ndarray,
        is_droppable: np.ndarray,
        by_number: bool = False,
    ) -> VideoIndex:
        return VideoIndex(
            self.path,
            self.codec,
            self.width,
            self.height,
            self.time_base,
            self.average_fps,
            self.display,
            self.colour_matrix,
            pts,
            packet_of_frame,
            packet_pts,
            is_key,
            is_shown,
            is_droppable,
            by_number,
        )


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
    about = _About(path, codec, first.width, first.height, time_base, rate, _display(path, first), _matrix(first))
    if all(packets.is_key) and None in packets.pts and None not in packets.dts:
        packets.pts = packets.dts  # nothing is reordered where every picture stands alone
    shown = [pts for pts, is_shown in zip(packets.pts, packets.is_shown, strict=True) if is_shown]
    made_up = (
        container.format.name == "avi" and context.has_b_frames and packets.pts == sorted(pts or 0 for pts in shown)
    )
    if None in packets.pts or len(set(shown)) != len(shown) or made_up:  # AVI knows the order of decoding only
        return _by_number(replace(about, average_fps=rate or 25.0, time_base=1 / (rate or 25.0)))
    return _assemble(about, packets)


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


def _assemble(about: _About, packets: _Packets) -> VideoIndex:
    pts, is_key = np.asarray(packets.pts, np.int64), np.asarray(packets.is_key)
    is_shown = np.asarray(packets.is_shown)
    first_key = int(np.flatnonzero(is_key)[0])
    # Before the first keyframe, in the file or on the screen, stand pictures whose references are not in the file.
    is_shown &= (np.arange(len(pts)) >= first_key) & (pts >= pts[first_key])
    highest = max((layer for layer in packets.sublayer if layer is not None), default=0)
    if not is_shown.any():
        raise VideoDecodeError(about.path, "no video frames")
    shown = np.flatnonzero(is_shown)
    order = shown[np.argsort(pts[shown])]
    return about.index(
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


def _by_number(about: _About) -> VideoIndex:
    """Count the frames by decoding all: raw streams, AVI with B-frames, repeated timestamps."""
    with av.open(about.path) as container:
        count = sum(1 for _ in decode_all(container))
    if not count:
        raise VideoDecodeError(about.path, "no video frames")
    numbers, yes = np.arange(count), np.ones(count, bool)
    return about.index(
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
