# SPDX-License-Identifier: Apache-2.0
"""PyAV half of video decoding: what a file holds, and exactly the wanted frames at full size.

A frame is known by its presentation timestamp, found in one demux pass: counts and rates in headers are often wrong.
Only groups of pictures that hold a wanted frame are decoded.
Colour follows DALI (always BT.601, bilinear chroma), so that a clip looks the same whichever of the two decoded it.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

_LIKE_DALI = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
# Some containers (MPEG-TS) seek too far now and then. Then start so many keyframes earlier, at last from the beginning.
_SEEK_BACK = (0, 1, 4)
# Pictures to which nothing refers (most B-frames) need no decoding unless they are wanted. These decoders look at the
# setting for every packet; others (dav1d) only when they are opened.
_SKIPS_UNREFERENCED = frozenset({"h264", "hevc"})
# Less than this missing at the end is how some muxers round, not a cut file.
_TRUNCATION_SECONDS, _TRUNCATION_FRACTION = 1.0, 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One demux pass: `pts` of all shown frames and `keys` of the keyframes among them, ascending, in `time_base`."""

    path: str
    codec: str
    width: int
    height: int
    time_base: float
    pts: np.ndarray
    keys: np.ndarray

    def info(self) -> VideoInfo:
        seconds = (self.pts - self.pts[0]) * self.time_base
        return VideoInfo(self.path, self.codec, self.width, self.height, tuple(seconds.tolist()))

    def sorted_unique(self, indices: Iterable[int]) -> list[int]:
        """The indices, each once. Raises VideoDecodeError for one that the video does not have."""
        wanted = sorted(set(indices))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self.pts):
            raise VideoDecodeError(self.path, f"frames {wanted[0]}..{wanted[-1]} asked for, it has {len(self.pts)}")
        return wanted

    def gop(self, index: int) -> int:
        """Number of the keyframe at or before frame `index`."""
        return max(bisect_right(self.keys, self.pts[index]) - 1, 0)

    def num_decoded(self, indices: Iterable[int]) -> int:
        """How many frames have to be decoded to get these when seeking is free."""
        last_of_gop = {self.gop(index): index for index in sorted(indices)}
        return sum(last + 1 - int(np.searchsorted(self.pts, self.keys[gop])) for gop, last in last_of_gop.items())


def scan(path: str) -> Scan:
    """What the file holds; remembered until the file changes. Raises VideoDecodeError."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise VideoDecodeError(path, f"cannot be read: {error.strerror}") from error
    if stat.st_size == 0:
        raise VideoDecodeError(path, "the file is empty (0 bytes)")
    return _scan(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _scan(path: str, mtime_ns: int, size: int) -> Scan:
    try:
        with av.open(path) as container:
            if container.format.name == "tty":  # FFmpeg plays text as a film of a terminal
                raise VideoDecodeError(path, "a text file")
            if not container.streams.video:
                raise VideoDecodeError(path, f"no video stream{_other_streams(container)}")
            return _scan_stream(path, container, container.streams.video[0])
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise VideoDecodeError(
            path, f"not a readable video (cut, damaged or another kind of file): {_cause(error)}"
        ) from error


def _scan_stream(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> Scan:
    codec = stream.codec_context
    if codec is None or codec.width == 0:
        raise VideoDecodeError(path, "unknown codec or picture size (damaged file?)")
    pts, keys, end, cut = [], [], 0, False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise VideoDecodeError(path, "frames without timestamps (damaged, a raw stream, or AVI); remux it to mp4")
        cut = packet.is_corrupt
        end = max(end, packet.pts + (packet.duration or 0))
        if packet.is_discard:  # outside the edit list: stored, never shown
            continue
        pts.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if not keys:
        raise VideoDecodeError(path, "no keyframe" if pts else "no video frames")
    if len(set(pts)) != len(pts):
        raise VideoDecodeError(path, "two frames have the same timestamp; re-encode or remux the file")
    time_base = float(stream.time_base)
    missing = _stated_end(container, stream) - end * time_base
    if cut or missing > max(_TRUNCATION_SECONDS, _TRUNCATION_FRACTION * end * time_base):
        raise VideoDecodeError(path, f"truncated: the data ends after {end * time_base:.1f} s of video")
    return Scan(path, codec.name, codec.width, codec.height, time_base, np.sort(pts), np.sort(keys))


def _stated_end(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Second at which the headers say the video ends; 0 where they do not say. Other streams may be longer."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration is not None:
        return start + float(stream.duration * stream.time_base)
    if tag := stream.metadata.get("DURATION"):  # Matroska, WebM
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if container.duration is not None and len(container.streams) == 1:
        return start + container.duration / av.time_base
    return 0.0


def _cause(error: av.FFmpegError | UnicodeDecodeError) -> str:
    return error.strerror if isinstance(error, av.FFmpegError) else str(error)


def _other_streams(container: av.container.InputContainer) -> str:
    kinds = sorted({stream.type for stream in container.streams})
    return f" (only {', '.join(kinds)})" if kinds else ""


def read_frames(path: str, indices: Sequence[int], num_threads: int = 1) -> np.ndarray:
    """uint8 RGB [F, height, width, 3]: the frames at these presentation indices, any order, repeats allowed."""
    found = scan(path)
    frames = dict(iter_frames(found, indices, num_threads))
    if not frames:
        return np.empty((0, found.height, found.width, 3), np.uint8)
    return np.stack([frames[index] for index in indices])


def iter_frames(found: Scan, indices: Iterable[int], num_threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [height, width, 3]) of each wanted frame, once, as they come. Raises VideoDecodeError."""
    wanted = found.sorted_unique(indices)
    to_rgb = _RgbConverter(found)
    try:
        with _open(found.path, num_threads) as container:
            for gop, members in groupby(wanted, key=found.gop):
                for index, frame in _decode_gop(container, found, gop, list(members), num_threads):
                    yield index, to_rgb(frame)
    except av.FFmpegError as error:
        raise VideoDecodeError(found.path, f"corrupt video data: {_cause(error)}") from error


class _RgbConverter:
    """libswscale, told to do what DALI does."""

    def __init__(self, found: Scan):
        self._found = found
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        size = self._found.width, self._found.height
        if (frame.width, frame.height) != size:
            raise VideoDecodeError(
                self._found.path, f"the picture changes from {size} to {(frame.width, frame.height)} inside the file"
            )
        return self._reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=Colorspace.ITU601,
            dst_colorspace=Colorspace.ITU601,
            interpolation=_LIKE_DALI,
        ).to_ndarray()


def _open(path: str, num_threads: int) -> av.container.InputContainer:
    container = av.open(path)
    context = container.streams.video[0].codec_context
    context.thread_count = num_threads
    context.thread_type = "AUTO"
    return container


def _decode_gop(
    container: av.container.InputContainer, found: Scan, gop: int, members: Sequence[int], num_threads: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames `members` of one group of pictures. If a seek missed it starts earlier, at last at the beginning."""
    missing = {int(found.pts[index]): index for index in members}
    for back in _SEEK_BACK:
        start = int(found.keys[max(gop - back, 0)])
        container.seek(start, stream=container.streams.video[0], backward=True)
        container.streams.video[0].codec_context.flush_buffers()
        yield from _take(container, found, gop, missing)
        if not missing:
            return
    with _open(found.path, num_threads) as from_beginning:
        yield from _take(from_beginning, found, gop, missing)
    if missing:
        raise VideoDecodeError(found.path, f"frame {min(missing.values())} cannot be decoded (corrupt or truncated)")


def _take(
    container: av.container.InputContainer, found: Scan, gop: int, missing: dict[int, int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode from where the container stands until nothing is `missing` or the time of the last one has passed."""
    stream = container.streams.video[0]
    last = max(missing)
    for packet in container.demux(stream):
        if found.codec in _SKIPS_UNREFERENCED:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in missing or not packet.size else "NONREF"
        for frame in packet.decode():
            # libavcodec marks a damaged picture but not those predicted from it: what follows in the group is lost too.
            # Marks before the group's keyframe mean nothing: after a seek, pictures of an open group lack a reference.
            if frame.is_corrupt and frame.pts is not None and frame.pts >= found.keys[gop]:
                raise VideoDecodeError(found.path, f"corrupt data before frame {min(missing.values())}")
            if frame.pts in missing:
                yield missing.pop(frame.pts), frame
            if not missing or (frame.pts is not None and frame.pts > last):
                return
