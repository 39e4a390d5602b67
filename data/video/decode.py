# SPDX-License-Identifier: Apache-2.0
"""Exactly the wanted frames of a video with libavcodec (PyAV), and as little decoding as that takes.

Runs of packets (gop_plan.py) are shared out over threads, each with its own container. A run starts at a keyframe,
which is checked by its timestamp after every seek, and gets only the packets of the plan; then the decoder is drained.
libavcodec hides damage: it marks a damaged picture but not those predicted from it, and may drop one without a word.
So a run in which any picture is marked or lost fails as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import av
import numpy as np

from data.video.container import cause, demux, open_media, stamp, video_stream
from data.video.gop_plan import GopRun, earlier_start, plan_runs, split_runs
from data.video.index import VideoIndex
from data.video.index_reader import decode_all
from megatron_rl.errors import VideoDecodeError

Deliver = Callable[[int, av.VideoFrame], None]
"""(frame number, decoded frame): called once for each wanted frame, from several threads, in no order."""

Slots = threading.Semaphore

# Reading over so many packets is cheaper than a seek.
_READ_OVER = 32
# A keyframe flag may promise too much (gradual refresh); then start so many keyframes earlier.
_START_EARLIER = (0, 1, 4)
# Parts per thread, so that one slow part does not keep the others waiting.
_PARTS_PER_THREAD = 4
# Report damage rather than guess; check the picture hashes that some HEVC streams carry.
_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}


class _Damaged(Exception):
    """This run did not give all its pictures unharmed."""


class OutOfStep(Exception):
    """The demuxer does not give the packets of the index here: a seek missed."""


def decode_frames(
    index: VideoIndex, frames: Sequence[int], num_threads: int, deliver: Deliver, slots: Slots | None = None
) -> None:
    """Decode `frames` (any order, repeats count once) and hand each to `deliver`. Raises VideoDecodeError.

    `slots` bounds the threads that decode at the same time where several videos are decoded at once.
    """
    wanted = index.sorted_unique(frames)
    if not wanted:
        return
    if index.by_number:
        with slots or nullcontext():
            _decode_by_number(index, wanted, deliver)
        return
    runs = plan_runs(index, wanted)
    num_workers = min(num_threads, len(runs))
    parts = _Shared(split_runs(runs, num_workers * _PARTS_PER_THREAD if num_workers > 1 else 1))
    if num_workers == 1:
        _work(index, parts, deliver, slots)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        workers = [pool.submit(_work, index, parts, deliver, slots) for _ in range(num_workers)]
        for worker in workers:
            worker.result()


class _Shared:
    """Parts of the work, taken by whichever thread is free; none after one has failed."""

    def __init__(self, parts: Sequence[list[GopRun]]):
        self._parts = iter(parts)
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[list[GopRun]]:
        while True:
            with self._lock:
                part = None if self._stopped else next(self._parts, None)
            if part is None:
                return
            yield part


def _work(index: VideoIndex, parts: _Shared, deliver: Deliver, slots: Slots | None) -> None:
    """One thread: its own container and decoder over the parts that it takes."""
    try:
        with PacketReader(index) as reader:
            for part in parts:
                with slots or nullcontext():
                    for run in part:
                        _decode_run(index, run, reader, deliver)
    except av.FFmpegError as error:
        parts.stop()
        raise VideoDecodeError(index.path, f"cannot be read any more: {cause(error)}") from error
    except VideoDecodeError:
        parts.stop()
        raise


def _decode_run(index: VideoIndex, run: GopRun, reader: PacketReader, deliver: Deliver) -> None:
    """The run, if need be without seeking or from an earlier keyframe."""
    missing = dict(run.wanted)
    reason = ""
    for num_keys in _START_EARLIER:
        attempt = earlier_start(index, run, num_keys) if num_keys else run
        if num_keys and attempt.start == run.start:
            break  # there is nothing earlier
        try:
            try:
                _take(index, attempt, reader, missing, deliver)
            except OutOfStep:
                reader.never_seek()
                _take(index, attempt, reader, missing, deliver)
            return
        except (_Damaged, OutOfStep) as error:
            reason = reason or str(error)
            reader.reset()
    at = min(missing.values(), default=min(run.wanted.values()))
    raise VideoDecodeError(index.path, f"corrupt: frame {at} cannot be decoded: {reason}")


def _take(index: VideoIndex, run: GopRun, reader: PacketReader, missing: dict[int, int], deliver: Deliver) -> None:
    """Feed the run's packets, deliver what is `missing`, check that every picture came out unharmed.

    Pictures shown before the run's keyframe (open groups) lack a reference here and are neither checked nor wanted.
    """
    key_pts = index.packet_pts[run.start]
    expected: set[int] = set()
    for number, packet in reader.packets(run.start, run.stop):
        if packet is not None:
            pts = packet.pts
            assert pts is not None  # the reader has compared it with the index
            if packet.is_corrupt:
                raise _Damaged("data that it needs is damaged or missing in the file")
            if index.is_droppable[number] and pts not in run.wanted:
                continue
            if index.is_shown[number] and pts >= key_pts:
                expected.add(pts)
        for frame in reader.decode(packet):
            if frame.pts is not None and frame.pts < key_pts:
                continue
            if frame.is_corrupt:
                raise _Damaged("a picture that it needs is damaged")
            expected.discard(frame.pts)
            if frame.pts in missing:
                deliver(missing.pop(frame.pts), frame)
    if expected or missing:
        raise _Damaged("a picture that it needs is damaged or missing")


class PacketReader:
    """A container that gives the packets of the index by number, and its decoder. Packets carry the index's times."""

    def __init__(self, index: VideoIndex):
        self._index = index
        self._seeks = True
        self._open()

    def __enter__(self) -> PacketReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self) -> None:
        self._container = _open_strict(self._index.path)
        self.stream = video_stream(self._index.path, self._container)
        self.reset()

    def reset(self) -> None:
        """Forget where the container stands; the next run seeks."""
        self.stream.codec_context.flush_buffers()
        self._demux: Iterator[av.Packet] | None = None
        self._next = 0

    def never_seek(self) -> None:
        """From now on read on, or from the beginning: behind a seek this container's packets are cut differently."""
        self._seeks = False
        self.reset()

    def packets(self, start: int, stop: int) -> Iterator[tuple[int, av.Packet | None]]:
        """(number, packet) of packets [start, stop) in decoding order, then (stop, None) to drain the decoder."""
        packet = self._find(start)
        for number in range(start, stop):
            if packet is None or stamp(packet) != self._index.packet_stamp[number]:
                raise OutOfStep("the packets are not where they were before (damaged, or the file has changed)")
            packet.pts = int(self._index.packet_pts[number])
            yield number, packet
            self._next = number + 1
            packet = self._read() if number + 1 < stop else None
        yield stop, None
        self.stream.codec_context.flush_buffers()

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self.stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            raise _Damaged(f"a picture that it needs is damaged ({cause(error)})") from error

    def _read(self) -> av.Packet | None:
        assert self._demux is not None
        return next(self._demux, None)

    def _find(self, number: int) -> av.Packet | None:
        """Packet `number`: read on to it if it is near, else seek; if that misses, earlier, at last from the start."""
        room = _READ_OVER if self._seeks else len(self._index.packet_pts)
        if self._demux is not None and 0 <= number - self._next <= room:
            return self._skip(number - self._next)
        return (self._seek(number) if self._seeks else None) or self._from_beginning(number)

    def _seek(self, number: int) -> av.Packet | None:
        landmark = self._landmark(number)
        if landmark is None:
            return None
        wanted = int(self._index.packet_stamp[landmark])
        for seconds_earlier in (0, 2, 10):
            target = wanted - int(seconds_earlier / self._index.time_base)
            self._container.seek(target, stream=self.stream, backward=True)
            self._demux = demux(self._container, self.stream)
            packet = self._read()
            # A seek lands on a keyframe, or in some containers on any packet, before or behind the wanted one.
            for _ in range(len(self._index.packet_stamp)):
                if packet is None or stamp(packet) == wanted:
                    break
                at = stamp(packet)
                if at is not None and packet.is_keyframe and at > wanted:
                    packet = None
                    break
                packet = self._read()
            if packet is not None and stamp(packet) == wanted:
                return packet if number == landmark else self._skip(number - landmark - 1)
        return None

    def _landmark(self, number: int) -> int | None:
        """`number`, or the last keyframe before it whose timestamp no other packet has."""
        stamps = self._index.packet_stamp
        if (stamps == stamps[number]).sum() == 1:
            return number
        keys = np.flatnonzero(self._index.is_key[:number])[::-1].tolist()
        return next((key for key in keys if (stamps == stamps[key]).sum() == 1), None)

    def _from_beginning(self, number: int) -> av.Packet | None:
        self._container.close()
        self._open()
        self._demux = demux(self._container, self.stream)
        return self._skip(number)

    def _skip(self, count: int) -> av.Packet | None:
        for _ in range(count):
            self._read()
        return self._read()


def _open_strict(path: str) -> av.container.InputContainer:
    """One decoder thread: libavcodec's own threads cost a third more CPU for little, and one that logs while PyAV frees
    its decoder waits for the interpreter's lock forever."""
    container = open_media(path)
    context = video_stream(path, container).codec_context
    context.thread_count = 1
    context.options = _STRICT
    return container


def _decode_by_number(index: VideoIndex, wanted: Sequence[int], deliver: Deliver) -> None:
    """From the beginning, counting, where packets have no timestamps to go by."""
    members, last = set(wanted), wanted[-1]
    try:
        with _open_strict(index.path) as container:
            for number, frame in enumerate(decode_all(container)):
                if frame.is_corrupt:
                    break
                if number in members:
                    members.discard(number)
                    deliver(number, frame)
                if number == last:
                    return
    except av.FFmpegError as error:
        raise VideoDecodeError(
            index.path, f"corrupt: frame {min(members)} cannot be decoded: {cause(error)}"
        ) from error
    raise VideoDecodeError(index.path, f"corrupt: frame {min(members)} or one before it is damaged")
