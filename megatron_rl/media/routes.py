# SPDX-License-Identifier: Apache-2.0
"""Which rank encodes which units of which item, and which rank sends which embeddings to which: arithmetic, then
messages.

A rank asks for the tokens it computes with and for no others. Every message is a run of tokens that lie behind each
other on both sides, so it is sent from and received into views: nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_rl.types import MediaItem, Run

WantedTokens = Mapping[str, Sequence[Run]]  # tokens by key; the runs of an item ascend and do not touch


@dataclass(frozen=True, slots=True)
class EncodeChunk:
    """Units [start, stop) of an item, encoded by `owner` in one call of the encoder."""

    key: str
    start: int
    stop: int
    owner: int


@dataclass(frozen=True, slots=True)
class EmbedMessage:
    """Tokens [start, stop) of a chunk (counted from its first), made on `source`, which become rows [at, ...) of the
    table that `target` keeps for the item."""

    chunk: EncodeChunk
    start: int
    stop: int
    source: int
    target: int
    at: int

    @property
    def in_chunk(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def in_table(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


def num_tokens(runs: Sequence[Run]) -> int:
    """Tokens in all the runs."""
    return sum(stop - start for start, stop in runs)


def split_over_ranks(
    media: Sequence[MediaItem], world: int, max_frames: int | None = None, multiple: int = 1
) -> dict[str, list[EncodeChunk]]:
    """Divide all units of a batch into `world` contiguous shares of equally many tokens, and these into chunks of at
    most `max_frames` frames, at least a unit.

    Contiguous, so that a rank decodes a stretch of few items and does not seek all over every file. An item is
    divided at multiples of `multiple` units only.
    """
    total = sum(item.num_tokens for item in media)
    chunks: dict[str, list[EncodeChunk]] = {item.key: [] for item in media}
    done = 0
    for item in media:
        start = 0
        while start < item.num_units:
            stop = item.num_units
            owner = min((done * world) // total, world - 1)
            if owner < world - 1:
                room = -(-((owner + 1) * total - done * world) // (world * item.tokens_per_unit))
                stop = min(stop, start + max(1, -(-room // multiple)) * multiple)
            max_units = max(1, max_frames // item.frames_per_unit) if max_frames else 0
            step = max(multiple, max_units // multiple * multiple) if max_units else stop - start
            chunks[item.key] += [EncodeChunk(item.key, i, min(stop, i + step), owner) for i in range(start, stop, step)]
            first, last = item.tokens_of(start, stop)
            done += last - first
            start = stop
    return chunks


def plan_messages(
    chunks: Mapping[str, Sequence[EncodeChunk]], media: Mapping[str, MediaItem], requests: Sequence[WantedTokens]
) -> list[list[EmbedMessage]]:
    """What must be moved so that rank r gets `requests[r]`, in rounds: in a round, a rank receives from one chunk.

    Rank r begins with the chunks of rank r + 1, so that not all ranks receive from the same one. What a rank keeps for
    itself is a message too, and comes in the first round.
    """
    rounds: list[list[EmbedMessage]] = [[]]
    for target, wanted in enumerate(requests):
        by_chunk = [m for key, runs in wanted.items() for m in _messages(chunks[key], media[key], runs, target)]
        rounds[0] += [m for part in by_chunk for m in part if m.source == target]
        remote = [part for part in by_chunk if part and part[0].source != target]
        remote.sort(key=lambda part: (part[0].source - target) % len(requests))
        rounds += [[] for _ in range(len(remote) - len(rounds) + 1)]
        for number, part in enumerate(remote, 1):
            rounds[number] += part
    return rounds


def _messages(
    chunks: Sequence[EncodeChunk], item: MediaItem, runs: Sequence[Run], target: int
) -> list[list[EmbedMessage]]:
    """The messages that bring `runs` of one item, by chunk."""
    result = []
    for chunk in chunks:
        first, last = item.tokens_of(chunk.start, chunk.stop)
        at, part = 0, []
        for start, stop in runs:
            low, high = max(start, first), min(stop, last)
            if low < high:
                part.append(EmbedMessage(chunk, low - first, high - first, chunk.owner, target, at + low - start))
            at += stop - start
        result.append(part)
    return result


def exchange(
    messages: Sequence[EmbedMessage],
    rank: int,
    outgoing: Callable[[EmbedMessage], Tensor],
    incoming: Callable[[EmbedMessage], Tensor],
    backwards: bool = False,
) -> int:
    """One round: send `outgoing(m)` of what this rank has and receive into `incoming(m)`, both [m.stop - m.start,
    width]; returns the bytes received.

    `backwards` goes from the targets to the sources. Every rank passes the same messages; those between a rank and
    itself are left to the caller.
    """
    operations, received = [], 0
    for message in messages:
        sender, receiver = (message.target, message.source) if backwards else (message.source, message.target)
        if sender == receiver or rank not in (sender, receiver):
            continue
        if rank == sender:
            operations.append(dist.P2POp(dist.isend, outgoing(message), receiver))
        else:
            tensor = incoming(message)
            received += tensor.numel() * tensor.element_size()
            operations.append(dist.P2POp(dist.irecv, tensor, sender))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    return received
