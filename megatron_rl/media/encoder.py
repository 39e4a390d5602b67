# SPDX-License-Identifier: Apache-2.0
"""Every medium is decoded and encoded once a step: its units split over all ranks, the embeddings fetched by the ranks
that need them. Shapes: types.py.

`encode` leaves each chunk on the rank that made it; `fetch` sends embeddings to the ranks that ask: whole items to the
rollout replica, to a rank of the trainer's first stage the tokens of its own rows. Where the encoder is trained,
`backward` sends their gradients the other way. A faulty file fails for all ranks alike and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from data.video.prefetch import FramePrefetcher
from megatron_rl.errors import VideoDecodeError
from megatron_rl.media.reading import Work, media_requests, num_patches
from megatron_rl.media.routes import (
    EmbedMessage,
    EncodeChunk,
    WantedTokens,
    exchange,
    num_tokens,
    plan_messages,
    split_over_ranks,
)
from megatron_rl.protocols import EmbeddingStore, MediaEncoder
from megatron_rl.types import EncodedMedia, MediaEmbeds, MediaItem


@dataclass(slots=True)
class EncoderCounts:
    """What this rank did since the counts were taken last; patches are those of pictures before they are merged,
    and columns of the spectrogram of sound."""

    encoded_patches: int = 0
    backward_patches: int = 0
    cached_patches: int = 0
    """Read from the store on disk instead of being encoded."""
    damaged_entries: int = 0
    received_bytes: int = 0


@dataclass(slots=True)
class _Step:
    """All that is known of the media of the current step."""

    media: dict[str, MediaItem] = field(default_factory=dict)
    chunks: dict[str, list[EncodeChunk]] = field(default_factory=dict)
    made: dict[EncodeChunk, Tensor] = field(default_factory=dict)
    """Embeddings [n, width] of the chunks of this rank."""
    frames: dict[EncodeChunk, Tensor] = field(default_factory=dict)
    """[F, ...] of the chunks of this rank, in host memory where the encoder is trained: it encodes them again."""
    failed: dict[str, str] = field(default_factory=dict)
    version: int = 0
    """Of the encoder that made `made`."""


def what_is_wrong(frames: Tensor) -> str:
    """Whether the input of an encoder or the encoder itself is to blame for embeddings that are not finite."""
    if frames.is_floating_point() and not bool(frames.isfinite().all()):
        return "what was read from the file is not finite"
    return "the file was read well: the encoder's weights are damaged or its numbers overflow"


class ParallelEncoder:
    """Embeddings of the current step (protocol StepEncoder).

    `frames_per_chunk` bounds the frames that go through the encoder together and the tokens that a rank receives at a
    time. `store` keeps embeddings on disk.
    """

    def __init__(
        self,
        encoder: MediaEncoder,
        frames: FramePrefetcher,
        *,
        blank: bool = False,
        frames_per_chunk: int = 64,
        store: EmbeddingStore | None = None,
    ):
        assert store is None or not encoder.is_trained, "what is trained is not kept on disk"
        self._encoder, self._frames = encoder, frames
        self._blank, self._frames_per_chunk, self._store = blank, frames_per_chunk, store
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._step = _Step()
        self.counts = EncoderCounts()

    def blanked(self) -> ParallelEncoder:
        """Another one over the same encoder, whose input is black frames and silence."""
        return ParallelEncoder(self._encoder, self._frames, blank=True, frames_per_chunk=self._frames_per_chunk)

    def take_counts(self) -> EncoderCounts:
        """The counts, which start again at zero."""
        counts, self.counts = self.counts, EncoderCounts()
        return counts

    def forget(self) -> None:
        """Drop all embeddings: the step they were made for is over."""
        self._step = _Step()

    def release(self) -> None:
        """Drop what this rank made: whoever needs tokens in this step has fetched them, and a trained encoder encodes
        the frames again."""
        self._step.made = {}

    # ---------------------------------------------------------------------------------------------------------- encode

    def prefetch(self, media: Sequence[MediaItem]) -> None:
        """Decode this rank's share of the media of a batch to come in the background, instead of any before; not what
        is in the store. Collective."""
        self._frames.drop()
        unique = list({item.key: item for item in media}.values())
        if not unique:
            return
        chunks, store = self._split(unique), self._store
        if store is not None:
            store.identify(unique)
        for item in unique:
            own = [c for c in chunks[item.key] if c.owner == self._rank]
            lacking = [c for c in own if store is None or not store.holds(item, c.start, c.stop)]
            self._frames.ask([request for request, _ in media_requests(item, lacking)])

    def close(self) -> None:
        """Nothing more will be encoded: do not decode what was asked for."""
        self._frames.drop()

    def encode(self, media: Sequence[MediaItem]) -> dict[str, str]:
        """Encode what is not there yet (equal keys once). Returns {key: reason} of those items that cannot be used.

        Collective; `media` is the same on every rank.
        """
        step = self._step
        unique = {item.key: item for item in media if item.key not in step.media}
        if unique:
            step.media |= unique
            step.chunks |= self._split(list(unique.values()))
            step.version = self._encoder.version
            missing = self._missing(list(unique.values()))
            self._frames.ask([request for work in missing.values() for request, _ in work])
            failed = {}
            for key, work in missing.items():
                try:
                    self._encode_item(step.media[key], work)
                except VideoDecodeError as error:
                    failed[key] = error.reason
            step.failed |= self._agree_on_failures(failed)
            if self._store is not None:
                self._store.trim()
        return {item.key: step.failed[item.key] for item in media if item.key in step.failed}

    def _split(self, media: Sequence[MediaItem]) -> dict[str, list[EncodeChunk]]:
        multiple = self._store.units_per_entry if self._store is not None else 1
        return split_over_ranks(media, self._world, self._frames_per_chunk, multiple)

    def _missing(self, media: Sequence[MediaItem]) -> dict[str, list[Work]]:
        """{key: what this rank has to encode}, once the store has been read."""
        if self._store is not None:
            self._store.identify(media)
        missing = {}
        for item in media:
            own = [c for c in self._step.chunks[item.key] if c.owner == self._rank]
            stored = self._read_stored(item, own)
            self._step.made |= stored
            missing[item.key] = media_requests(item, [c for c in own if c not in stored])
        return missing

    def _read_stored(self, item: MediaItem, chunks: Sequence[EncodeChunk]) -> dict[EncodeChunk, Tensor]:
        if self._store is None:
            return {}
        found = {}
        for chunk in chunks:
            embeds, num_damaged = self._store.read(item, chunk.start, chunk.stop)
            self.counts.damaged_entries += num_damaged
            if embeds is not None and not bool(embeds.isfinite().all()):
                self.counts.damaged_entries += 1  # written before such embeddings were refused
                embeds = None
            if embeds is not None:
                found[chunk] = embeds.to(self._encoder.device)
                self.counts.cached_patches += num_patches(item, chunk)
        return found

    def _encode_item(self, item: MediaItem, work: Sequence[Work]) -> None:
        """Embeddings of this rank's chunks of an item. All frames are taken, whatever comes of the first, so that none
        stay behind."""
        error: VideoDecodeError | None = None
        for request, chunks in work:
            try:
                frames = self._frames.take(request)
                if error is None:
                    self._encode_chunks(item, chunks, torch.zeros_like(frames) if self._blank else frames)
            except VideoDecodeError as found:
                error = error or found
        if error is not None:
            raise error

    def _encode_chunks(self, item: MediaItem, chunks: Sequence[EncodeChunk], frames: Tensor) -> None:
        """`frames` are those of all the chunks, one behind the other. Raises VideoDecodeError where an embedding is not
        finite: the engine would sample from it without complaint, and the store would keep it."""
        ranges = [item.frames_of(chunk.start, chunk.stop) for chunk in chunks]
        for chunk, part in zip(chunks, frames.split([last - first for first, last in ranges]), strict=True):
            embeds = self._encoder.encode(part, item.kind)
            self.counts.encoded_patches += num_patches(item, chunk)
            if not bool(embeds.isfinite().all()):
                raise VideoDecodeError(item.path, f"its embeddings are not finite ({what_is_wrong(part)})")
            self._step.made[chunk] = embeds
            if self._encoder.is_trained:
                self._step.frames[chunk] = part.cpu()
            if self._store is not None:
                self._store.write(item, chunk.start, chunk.stop, embeds)

    def _agree_on_failures(self, failed: dict[str, str]) -> dict[str, str]:
        everyone: list[dict[str, str]] = [{} for _ in range(self._world)]
        dist.all_gather_object(everyone, failed)
        return {key: reason for part in everyone for key, reason in part.items()}

    # ----------------------------------------------------------------------------------------------------------- fetch

    def fetch(self, media: Sequence[MediaItem]) -> EncodedMedia:
        """The whole items that this rank asks for, in host memory: the engine copies one to the device when it computes
        with it. Collective; every rank may ask for others."""
        tables = self._fetch({item.key: ((0, item.num_tokens),) for item in media}, to_host=True)
        return EncodedMedia(tables, f"{self._step.version}{' blank' if self._blank else ''}")

    def fetch_tokens(self, wanted: WantedTokens) -> MediaEmbeds:
        """The tokens this rank asks for; leaves of the autograd graph, in fp32, where the encoder is trained.

        Collective; every rank may ask for others.
        """
        tables = self._fetch(wanted, to_host=False)
        if self._encoder.is_trained:
            tables = {key: table.float().requires_grad_() for key, table in tables.items()}
        return MediaEmbeds(tables, {key: tuple(runs) for key, runs in wanted.items()}, self._step.version)

    def _fetch(self, wanted: WantedTokens, to_host: bool) -> dict[str, Tensor]:
        requests = self._all_requests(wanted)
        if not any(requests):
            return {}
        assert self._step.version == self._encoder.version, "made by another version; use `refreshed`"
        tables = {key: self._empty(num_tokens(runs), to_host) for key, runs in wanted.items()}
        for messages in self._plan(requests):
            self._receive(messages, tables)
        return tables

    def _receive(self, messages: Sequence[EmbedMessage], tables: Mapping[str, Tensor]) -> None:
        """One round into `tables`."""

        def outgoing(message: EmbedMessage) -> Tensor:
            return self._step.made[message.chunk][message.in_chunk]

        for message, rows in self._arrivals(messages, outgoing, self._encoder.dtype).items():
            tables[message.chunk.key][message.in_table] = rows

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        """`embeds` itself or, if the encoder has changed since, the same tokens of the encoder as it is. Collective."""
        if embeds.version == self._encoder.version:
            return embeds
        keys = {key for request in self._all_requests(embeds.wanted) for key in request}
        self._encode_again(keys)
        again = self.fetch_tokens(embeds.wanted)
        self.release()
        return again

    def _encode_again(self, keys: set[str]) -> None:
        """Chunks of these items with the present weights; those of others, made with other ones, are dropped."""
        step = self._step
        step.made = {}
        for chunk, frames in step.frames.items():
            if chunk.key in keys:
                item = step.media[chunk.key]
                step.made[chunk] = self._encoder.encode(frames, item.kind)
                self.counts.encoded_patches += num_patches(item, chunk)
        step.version = self._encoder.version

    # -------------------------------------------------------------------------------------------------------- backward

    def backward(self, embeds: MediaEmbeds) -> None:
        """Take the gradients of `embeds` to the ranks that encoded them and through the encoder, encoding once more.

        The encoder's parameters get their gradients as in any backward pass; who owns them sums them over ranks.
        Collective.
        """
        step = self._step
        assert embeds.version == self._encoder.version, "the encoder has changed since these embeddings were made"
        rounds = self._plan(self._all_requests(embeds.wanted))
        asked = {m.chunk for messages in rounds for m in messages if m.source == self._rank}
        grads = {chunk: self._zero_gradient(chunk) for chunk in asked}
        for messages in rounds:
            self._collect_gradients(messages, embeds.tables, grads)
        for chunk in sorted(asked, key=lambda c: (c.key, c.start)):
            item = step.media[chunk.key]
            self._encoder.backward(step.frames[chunk], grads.pop(chunk), item.kind)
            self.counts.backward_patches += num_patches(item, chunk)

    def _collect_gradients(
        self, messages: Sequence[EmbedMessage], tables: Mapping[str, Tensor], grads: Mapping[EncodeChunk, Tensor]
    ) -> None:
        """One round: add what the targets of the messages have to the gradients of this rank's chunks."""

        def outgoing(message: EmbedMessage) -> Tensor:
            grad = tables[message.chunk.key].grad
            assert grad is not None, "every token that was asked for stands in some micro-batch"
            return grad[message.in_table]

        for message, grad in self._arrivals(messages, outgoing, torch.float32, backwards=True).items():
            grads[message.chunk][message.in_chunk] += grad

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
            arriving[message] = torch.empty(rows, self._encoder.width, dtype=dtype, device=self._encoder.device)
            return arriving[message]

        self.counts.received_bytes += exchange(messages, self._rank, outgoing, incoming, backwards)
        for message in messages:
            if message.source == message.target == self._rank:
                arriving[message] = outgoing(message)
        return arriving

    def _all_requests(self, wanted: WantedTokens) -> list[WantedTokens]:
        requests: list[WantedTokens] = [{} for _ in range(self._world)]
        dist.all_gather_object(requests, dict(wanted))
        return requests

    def _plan(self, requests: Sequence[WantedTokens]) -> list[list[EmbedMessage]]:
        return plan_messages(self._step.chunks, self._step.media, requests)

    def _zero_gradient(self, chunk: EncodeChunk) -> Tensor:
        first, last = self._step.media[chunk.key].tokens_of(chunk.start, chunk.stop)
        return torch.zeros(last - first, self._encoder.width, device=self._encoder.device)

    def _empty(self, rows: int, in_host_memory: bool) -> Tensor:
        device = torch.device("cpu") if in_host_memory else self._encoder.device
        return torch.empty(rows, self._encoder.width, dtype=self._encoder.dtype, device=device)
