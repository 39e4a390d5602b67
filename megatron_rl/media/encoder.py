# SPDX-License-Identifier: Apache-2.0
"""Every video is decoded and encoded once a step: its frames split over all ranks, the tokens fetched by who needs
them.

`encode` leaves each piece on the rank that made it; `fetch` moves tokens to the ranks that ask: whole videos to the
rollout replica, to a rank of the trainer's first stage the tokens of its own rows. Where the tower is trained,
`backward` takes the same way back. A faulty file fails for all ranks alike and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from data.video.prefetch import FramePrefetcher, FrameRequest
from megatron_rl.errors import VideoDecodeError
from megatron_rl.media.routes import (
    EmbedMessage,
    EncodeChunk,
    Wanted,
    exchange,
    num_tokens,
    plan_messages,
    split_over_ranks,
)
from megatron_rl.protocols import EmbeddingStore, MediaEncoder
from megatron_rl.types import DECODED_BYTES, MediaEmbeds, MediaItem

Work = tuple[FrameRequest, tuple[EncodeChunk, ...]]  # frames to decode together, and the pieces that they make


@dataclass(slots=True)
class EncoderCounts:
    """What this rank did since the counts were taken last; patches are the tower's, before they are merged."""

    encoded_patches: int = 0
    backward_patches: int = 0
    cached_patches: int = 0
    """Read from the store on disk instead of being encoded."""
    damaged_entries: int = 0
    received_bytes: int = 0


@dataclass(slots=True)
class _Step:
    """All that is known of the videos of the current step."""

    videos: dict[str, MediaItem] = field(default_factory=dict)
    pieces: dict[str, list[EncodeChunk]] = field(default_factory=dict)
    made: dict[EncodeChunk, Tensor] = field(default_factory=dict)
    frames: dict[EncodeChunk, Tensor] = field(default_factory=dict)
    """Kept in host memory where the tower is trained: it encodes them again."""
    failed: dict[str, str] = field(default_factory=dict)
    version: int = 0
    """Of the tower that made `made`."""


class ParallelEncoder:
    """Embeddings of the current step. Without a tower, it refuses every video.

    `frames_per_chunk` bounds the frames that go through the tower together and the tokens that a rank receives at a
    time. `store` keeps embeddings on disk.
    """

    def __init__(
        self,
        tower: MediaEncoder | None,
        frames: FramePrefetcher,
        hidden_size: int,
        blank: bool = False,
        frames_per_chunk: int = 64,
        store: EmbeddingStore | None = None,
    ):
        assert store is None or tower is None or not tower.is_trained, "what is trained is not kept on disk"
        self._tower, self._frames, self._hidden = tower, frames, hidden_size
        self._blank, self._frames_per_chunk, self._store = blank, frames_per_chunk, store
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._step = _Step()
        self.counts = EncoderCounts()

    def blanked(self) -> ParallelEncoder:
        """A second cache over the same tower, which sees black frames."""
        return ParallelEncoder(self._tower, self._frames, self._hidden, True, self._frames_per_chunk)

    def take_counts(self) -> EncoderCounts:
        """The counts, which start again at zero."""
        counts, self.counts = self.counts, EncoderCounts()
        return counts

    def forget(self) -> None:
        """Drop all embeddings: the step they were made for is over."""
        self._step = _Step()

    def release(self) -> None:
        """Drop what this rank made: whoever needs tokens in this step has fetched them, and a trained tower encodes the
        frames again."""
        self._step.made = {}

    # ---------------------------------------------------------------------------------------------------------- encode

    def prefetch(self, videos: Sequence[MediaItem]) -> None:
        """Decode this rank's share of the videos of a batch to come in the background, instead of any before; not what
        is in the store. Collective."""
        self._frames.drop()
        unique = list({v.key: v for v in videos}.values())
        if not unique or self._tower is None:
            return
        pieces, store = self._split(unique), self._store
        if store is not None:
            store.identify(unique)
        for video in unique:
            own = [p for p in pieces[video.key] if p.owner == self._rank]
            lacking = [p for p in own if store is None or not store.holds(video, p.start, p.stop)]
            self._frames.ask([request for request, _ in frame_requests(video, lacking)])

    def close(self) -> None:
        """Nothing more will be encoded: do not decode what was asked for."""
        self._frames.drop()

    def encode(self, videos: Sequence[MediaItem]) -> dict[str, str]:
        """Encode what is not there yet (equal keys once). Returns {key: reason} of those videos that cannot be used.

        Collective; `videos` is the same on every rank.
        """
        if videos and self._tower is None:
            raise ValueError(f"{videos[0].path}: this model takes no video; use a model that does")
        step = self._step
        unique = {v.key: v for v in videos if v.key not in step.videos}
        if unique:
            step.videos |= unique
            step.pieces |= self._split(list(unique.values()))
            step.version = self._tower.version
            missing = self._missing(list(unique.values()))
            self._frames.ask([request for work in missing.values() for request, _ in work])
            failed = {}
            for key, work in missing.items():
                try:
                    self._make(step.videos[key], work)
                except VideoDecodeError as error:
                    failed[key] = error.reason
            step.failed |= self._agree_on_failures(failed)
            if self._store is not None:
                self._store.trim()
        return {v.key: step.failed[v.key] for v in videos if v.key in step.failed}

    def _split(self, videos: Sequence[MediaItem]) -> dict[str, list[EncodeChunk]]:
        most = max(1, self._frames_per_chunk // self._tower.spec.temporal_patch_size)
        unit = self._store.patches_per_entry if self._store is not None else 1
        return split_over_ranks(videos, self._world, most, unit)

    def _missing(self, videos: Sequence[MediaItem]) -> dict[str, list[Work]]:
        """{key: what this rank has to encode}, once the store has been read."""
        if self._store is not None:
            self._store.identify(videos)
        missing = {}
        for video in videos:
            own = [p for p in self._step.pieces[video.key] if p.owner == self._rank]
            stored = self._read_stored(video, own)
            self._step.made |= stored
            missing[video.key] = frame_requests(video, [p for p in own if p not in stored])
        return missing

    def _read_stored(self, video: MediaItem, pieces: Sequence[EncodeChunk]) -> dict[EncodeChunk, Tensor]:
        if self._store is None:
            return {}
        found = {}
        for piece in pieces:
            embeds, num_damaged = self._store.read(video, piece.start, piece.stop)
            self.counts.damaged_entries += num_damaged
            if embeds is not None:
                found[piece] = embeds.to(self._tower.device)
                self.counts.cached_patches += _patches(video, piece)
        return found

    def _make(self, video: MediaItem, work: Sequence[Work]) -> None:
        """Embeddings of this rank's pieces of a video. All frames are taken, whatever comes of the first, so that none
        stay behind."""
        error: VideoDecodeError | None = None
        for request, pieces in work:
            try:
                frames = self._frames.take(request)
            except VideoDecodeError as found:
                error = error or found
                continue
            if error is None:
                self._encode_pieces(video, pieces, torch.zeros_like(frames) if self._blank else frames)
        if error is not None:
            raise error

    def _encode_pieces(self, video: MediaItem, pieces: Sequence[EncodeChunk], frames: Tensor) -> None:
        """`frames` are those of all the pieces, one behind the other."""
        per_patch = len(frames) // sum(p.stop - p.start for p in pieces)
        parts = frames.split([(p.stop - p.start) * per_patch for p in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            self._step.made[piece] = embeds = self._tower.encode(part)
            self.counts.encoded_patches += _patches(video, piece)
            if self._tower.is_trained:
                self._step.frames[piece] = part.cpu()
            if self._store is not None:
                self._store.write(video, piece.start, embeds)

    def _agree_on_failures(self, failed: dict[str, str]) -> dict[str, str]:
        everyone: list[dict[str, str]] = [{} for _ in range(self._world)]
        dist.all_gather_object(everyone, failed)
        return {key: reason for part in everyone for key, reason in part.items()}

    # ----------------------------------------------------------------------------------------------------------- fetch

    def fetch(self, videos: Sequence[MediaItem]) -> dict[str, Tensor]:
        """{key: [num_tokens, H]} of the videos this rank asks for, in host memory: the engine takes one to the device
        when it is its turn. Collective; every rank may ask for other videos."""
        return self._fetch({v.key: ((0, v.num_tokens),) for v in videos}, to_host=True)

    def fetch_tokens(self, wanted: Wanted) -> MediaEmbeds:
        """The tokens this rank asks for; leaves of the autograd graph, in fp32, where the tower is trained. Collective;
        every rank may ask for others."""
        tables = self._fetch(wanted, to_host=False)
        if self._tower is not None and self._tower.is_trained:
            tables = {key: table.float().requires_grad_() for key, table in tables.items()}
        return MediaEmbeds(tables, {key: tuple(runs) for key, runs in wanted.items()}, self._step.version)

    def _fetch(self, wanted: Wanted, to_host: bool) -> dict[str, Tensor]:
        requests = self._everyones(wanted)
        if not any(requests):
            return {}
        assert self._step.version == self._tower.version, "made by another tower; use `refreshed`"
        tables = {key: self._empty(num_tokens(runs), to_host) for key, runs in wanted.items()}
        for messages in self._plan(requests):
            self._receive(messages, tables)
        return tables

    def _receive(self, messages: Sequence[EmbedMessage], tables: Mapping[str, Tensor]) -> None:
        """One round into `tables`."""

        def outgoing(message: EmbedMessage) -> Tensor:
            return self._step.made[message.piece][message.in_piece]

        for message, rows in self._arrivals(messages, outgoing, self._tower.dtype).items():
            tables[message.piece.key][message.in_table] = rows

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        """`embeds` itself or, if the tower has changed since, the same tokens of the tower as it is. Collective."""
        if self._tower is None or embeds.version == self._tower.version:
            return embeds
        keys = {key for request in self._everyones(embeds.wanted) for key in request}
        self._encode_again(keys)
        again = self.fetch_tokens(embeds.wanted)
        self.release()
        return again

    def _encode_again(self, keys: set[str]) -> None:
        """Pieces of these videos with the present tower; those of others, made with another one, are dropped."""
        step = self._step
        step.made = {}
        for piece, frames in step.frames.items():
            if piece.key in keys:
                step.made[piece] = self._tower.encode(frames)
                self.counts.encoded_patches += _patches(step.videos[piece.key], piece)
        step.version = self._tower.version

    # -------------------------------------------------------------------------------------------------------- backward

    def backward(self, embeds: MediaEmbeds) -> None:
        """Take the gradients of `embeds` to the ranks that encoded them and through the tower, encoding once more.

        The tower's parameters get their gradients as in any backward pass; they are summed over ranks by who owns them.
        Collective.
        """
        step = self._step
        assert embeds.version == self._tower.version, "the tower has changed since these embeddings were made"
        rounds = self._plan(self._everyones(embeds.wanted))
        asked = {m.piece for messages in rounds for m in messages if m.source == self._rank}
        grads = {piece: self._no_gradient(piece) for piece in asked}
        for messages in rounds:
            self._collect_gradients(messages, embeds.tables, grads)
        for piece in sorted(asked, key=lambda p: (p.key, p.start)):
            self._tower.backward(step.frames[piece], grads.pop(piece))
            self.counts.backward_patches += _patches(step.videos[piece.key], piece)

    def _collect_gradients(
        self, messages: Sequence[EmbedMessage], tables: Mapping[str, Tensor], grads: Mapping[EncodeChunk, Tensor]
    ) -> None:
        """One round: add what the targets of the messages have to the gradients of this rank's pieces."""

        def outgoing(message: EmbedMessage) -> Tensor:
            grad = tables[message.piece.key].grad
            assert grad is not None, "every token that was asked for stands in some micro-batch"
            return grad[message.in_table]

        for message, grad in self._arrivals(messages, outgoing, torch.float32, backwards=True).items():
            grads[message.piece][message.in_piece] += grad

    # --------------------------------------------------------------------------------------------------------- helpers

    def _arrivals(
        self,
        messages: Sequence[EmbedMessage],
        outgoing: Callable[[EmbedMessage], Tensor],
        dtype: torch.dtype,
        backwards: bool = False,
    ) -> dict[EmbedMessage, Tensor]:
        """One round: what arrives here, and what this rank has itself."""
        arriving: dict[EmbedMessage, Tensor] = {}

        def incoming(message: EmbedMessage) -> Tensor:
            rows = message.stop - message.start
            arriving[message] = torch.empty(rows, self._hidden, dtype=dtype, device=self._tower.device)
            return arriving[message]

        self.counts.received_bytes += exchange(messages, self._rank, outgoing, incoming, backwards)
        for message in messages:
            if message.source == message.target == self._rank:
                arriving[message] = outgoing(message)
        return arriving

    def _everyones(self, wanted: Wanted) -> list[Wanted]:
        requests: list[Wanted] = [{} for _ in range(self._world)]
        dist.all_gather_object(requests, dict(wanted))
        return requests

    def _plan(self, requests: Sequence[Wanted]) -> list[list[EmbedMessage]]:
        videos = self._step.videos.items()
        return plan_messages(self._step.pieces, {key: v.num_tokens // v.grid_thw[0] for key, v in videos}, requests)

    def _no_gradient(self, piece: EncodeChunk) -> Tensor:
        video = self._step.videos[piece.key]
        rows = (piece.stop - piece.start) * (video.num_tokens // video.grid_thw[0])
        return torch.zeros(rows, self._hidden, device=self._tower.device)

    def _empty(self, rows: int, in_host_memory: bool) -> Tensor:
        device = torch.device("cpu") if in_host_memory else self._tower.device
        return torch.empty(rows, self._hidden, dtype=self._tower.dtype, device=device)


def _patches(video: MediaItem, piece: EncodeChunk) -> int:
    return (piece.stop - piece.start) * video.grid_thw[1] * video.grid_thw[2]


def frame_requests(video: MediaItem, pieces: Sequence[EncodeChunk]) -> list[Work]:
    """The frames of the pieces, decoded together as far as DECODED_BYTES allows."""
    per_patch = len(video.frame_indices) // video.grid_thw[0]
    most = max(1, DECODED_BYTES // (per_patch * 3 * video.size_hw[0] * video.size_hw[1]))
    work = []
    for _, group in groupby(pieces, key=lambda p: (p.start - pieces[0].start) // most):
        together = tuple(group)
        frames = [i for p in together for i in video.frame_indices[p.start * per_patch : p.stop * per_patch]]
        work.append((FrameRequest(video.path, tuple(frames), video.size_hw, video.is_image), together))
    return work
