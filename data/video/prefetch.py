# SPDX-License-Identifier: Apache-2.0
"""Frames decoded in the background, while the engine generates or the tower encodes.

A rank decodes only the parts of media that it encodes itself, so every frame of a node is decoded once and held once,
however many ranks and rollouts use its embeddings; and no longer than until it is encoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from data.audio import decode_audio
from data.video.images import decode_image
from megatron_rl.protocols import AudioSpec, VideoDecoder
from megatron_rl.types import MediaKind

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """Some frames of a video or image at one size."""

    path: str
    frame_indices: tuple[int, ...]
    size_hw: tuple[int, int]
    kind: MediaKind = "video"

    @property
    def num_bytes(self) -> int:
        return len(self.frame_indices) * 3 * self.size_hw[0] * self.size_hw[1]


@dataclass(frozen=True, slots=True)
class SoundRequest:
    """Columns [first, last) of the spectrogram of a sound, which is made of all that `span` (seconds) holds."""

    path: str
    span: tuple[float, float]
    first: int
    last: int
    num_mels: int

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * self.num_mels * FLOAT32_BYTES


MediaRequest = FrameRequest | SoundRequest


class FramePrefetcher:
    """Begins to decode requests in their order, `num_workers` at a time; at most `budget_bytes` of frames are there or
    on their way. A budget of 0 decodes everything only when it is taken. `sound` is needed for requests of sound.
    """

    def __init__(self, decoder: VideoDecoder, budget_bytes: int, num_workers: int = 1, sound: AudioSpec | None = None):
        self._decoder, self._sound = decoder, sound
        self._num_workers = num_workers
        self._budget = budget_bytes
        self._waiting: OrderedDict[MediaRequest, None] = OrderedDict()
        self._started: dict[MediaRequest, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def ask(self, requests: Sequence[MediaRequest]) -> None:
        """These will be taken, in this order, after what was asked for before."""
        for request in requests:
            if request not in self._started:
                self._waiting[request] = None
        self._start_some()

    def take(self, request: MediaRequest) -> Tensor:
        """uint8 RGB [F, 3, height, width], of sound float32 [F, mels]; once.

        Raises VideoDecodeError if that is what decoding came to.
        """
        self._waiting.pop(request, None)
        future = self._started.pop(request, None)
        self._start_some()
        if future is not None:
            return future.result()
        return self._decode(request)

    def drop(self) -> None:
        """Forget all requests that were not taken."""
        for future in self._started.values():
            future.cancel()
        self._waiting.clear()
        self._started.clear()

    @property
    def num_bytes(self) -> int:
        """Of the frames that are decoded or being decoded."""
        return sum(request.num_bytes for request in self._started)

    def _start_some(self) -> None:
        while self._waiting:
            request = next(iter(self._waiting))
            if self.num_bytes + request.num_bytes > self._budget:
                return
            del self._waiting[request]
            self._pool = self._pool or ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
            self._started[request] = self._pool.submit(self._decode, request)

    def _decode(self, request: MediaRequest) -> Tensor:
        if isinstance(request, SoundRequest):
            assert self._sound is not None, "a prompt has sound only where the family hears"
            samples = decode_audio(request.path, request.span, self._sound.rate)
            return self._sound.spectrogram(samples)[request.first : request.last]
        if request.kind == "image":
            return decode_image(request.path, len(request.frame_indices), request.size_hw)
        return self._decoder.decode(request.path, request.frame_indices, request.size_hw)
