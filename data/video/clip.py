# SPDX-License-Identifier: Apache-2.0
"""The packets of a decoding plan as a small file of its own, for a decoder that cannot seek.

DALI's decoder reads a file from its first frame to the last wanted one. Given only the packets of the plan, it does no
more work than one that seeks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from data.video.container import cause
from data.video.decode import OutOfStep, PacketReader
from data.video.gop_plan import GopRun
from data.video.index import VideoIndex
from megatron_rl.errors import VideoDecodeError

_TICK = 40  # milliseconds between pictures: the clip's own clock, every file's is different
_DELAY = 32  # pictures by which decoding runs ahead of showing; no codec reorders over more than 16


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A Matroska file in memory. Frame `frames[i]` of the video is number `positions[i]` of its `num_frames`."""

    data: np.ndarray
    frames: tuple[int, ...]
    positions: tuple[int, ...]
    num_frames: int


def clip_parts(index: VideoIndex, runs: Sequence[GopRun], room: int) -> Iterator[list[GopRun]]:
    """Runs that can share a clip: together at most `room` wanted frames, but no run is cut.

    In a video with open groups every run is alone: behind another run, a decoder takes its keyframe for one in the
    middle of a stream and drops pictures that seem to come late.
    """
    last_key = np.maximum.accumulate(np.where(index.is_key, np.arange(len(index.is_key)), 0))
    alone = bool((index.packet_pts < index.packet_pts[last_key]).any())
    part: list[GopRun] = []
    for run in runs:
        if part and (alone or sum(len(r.wanted) for r in part) + len(run.wanted) > room):
            yield part
            part = []
        part.append(run)
    if part:
        yield part


def cut_clip(index: VideoIndex, runs: Sequence[GopRun]) -> Clip:
    """Copy the packets of these runs, re-timed so that runs follow one another. Raises VideoDecodeError."""
    target = io.BytesIO()
    frames: list[int] = []
    positions: list[int] = []
    base = 0
    try:
        with PacketReader(index) as reader, av.open(target, "w", format="matroska") as container:
            stream = container.add_stream_from_template(reader.stream, opaque=True)
            for run in runs:
                try:
                    packets = _packets_of(index, run, reader)
                except OutOfStep:
                    reader.never_seek()
                    packets = _packets_of(index, run, reader)
                rank = {pts: base + number for number, pts in enumerate(sorted(pts for pts, _ in packets))}
                _mux(container, stream, packets, rank, base)
                for pts, frame in run.wanted.items():
                    frames.append(frame)
                    positions.append(rank[pts])
                base += len(packets)
    except (av.FFmpegError, OutOfStep) as error:
        raise VideoDecodeError(index.path, f"cannot be read any more: {cause(error)}") from error
    return Clip(np.frombuffer(target.getvalue(), np.uint8), tuple(frames), tuple(positions), base)


def _packets_of(index: VideoIndex, run: GopRun, reader: PacketReader) -> list[tuple[int, av.Packet]]:
    """(pts, packet) of what has to be decoded. Pictures shown before the keyframe lack a reference and are left out."""
    key_pts = index.packet_pts[run.start]
    kept = []
    for number, packet in reader.packets(run.start, run.stop):
        if packet is not None and packet.pts is not None and packet.pts >= key_pts:
            if packet.pts in run.wanted or not index.is_droppable[number]:
                kept.append((packet.pts, packet))
    return kept


def _mux(
    container: av.container.OutputContainer,
    stream: av.VideoStream,
    packets: Sequence[tuple[int, av.Packet]],
    rank: dict[int, int],
    base: int,
) -> None:
    tick = stream.time_base or Fraction(1, 1000)
    for number, (pts, packet) in enumerate(packets):
        packet.stream = stream
        packet.time_base = tick
        packet.pts = round((rank[pts] + _DELAY) * _TICK / 1000 / tick)
        packet.dts = round((base + number) * _TICK / 1000 / tick)
        container.mux(packet)
