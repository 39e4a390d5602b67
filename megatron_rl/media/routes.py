# SPDX-License-Identifier: Apache-2.0
"""Which rank encodes which part of which video, and who sends which embeddings to whom: arithmetic, then messages.

A rank asks for the tokens it computes with and for no others. Every message is a run of tokens that lie behind each
other on both sides, so it is sent from and received into views: nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_rl.types import MediaItem

Run = tuple[int, int]  # tokens [start, stop) of a video
Wanted = Mapping[str, Sequence[Run]]  # by video key; the runs of a video ascend and do not touch


@dataclass(frozen=True, slots=True)
class EncodeChunk:
    """Temporal patches [start, stop) of a video, encoded by `owner` in one call of the tower."""

    key: str
    start: int
    stop: int
    owner: int


@dataclass(frozen=True, slots=True)
class EmbedMessage:
    """Tokens [start, stop) of a piece (counted from its first), made on `source`, which become rows [at, ...) of the
    table that `target` keeps for the video."""

    piece: EncodeChunk
    start: int
    stop: int
    source: int
    target: int
    at: int

    @property
    def in_piece(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def in_table(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


def num_tokens(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def split_over_ranks(
    videos: Sequence[MediaItem], world: int, most: int | None = None, unit: int = 1
) -> dict[str, list[EncodeChunk]]:
    """Cut all temporal patches of a batch into `world` contiguous, equally expensive shares, and these into pieces of
    at most `most` patches.

    Contiguous, so that a rank decodes a stretch of few videos and does not seek all over every file. A video is cut at
    multiples of `unit` patches only.
    """
    total = sum(v.num_tokens for v in videos)
    pieces: dict[str, list[EncodeChunk]] = {v.key: [] for v in videos}
    done = 0
    for video in videos:
        grid_t = video.grid_thw[0]
        per_patch = video.num_tokens // grid_t
        start = 0
        while start < grid_t:
            owner = min((done * world) // total, world - 1)
            room = -(-((owner + 1) * total - done * world) // (world * per_patch)) if owner < world - 1 else grid_t
            stop = min(grid_t, start + max(1, -(-room // unit)) * unit)
            step = max(unit, most // unit * unit) if most else stop - start
            pieces[video.key] += [
                EncodeChunk(video.key, i, min(stop, i + step), owner) for i in range(start, stop, step)
            ]
            done += (stop - start) * per_patch
            start = stop
    return pieces


def plan_messages(
    pieces: Mapping[str, Sequence[EncodeChunk]], per_patch: Mapping[str, int], requests: Sequence[Wanted]
) -> list[list[EmbedMessage]]:
    """What must be moved so that rank r gets `requests[r]`, in rounds: in a round, a rank receives from one piece.

    Rank r begins with the pieces of the rank behind it, so that not all turn to the same one. What a rank keeps for
    itself is a message too, and comes in the first round.
    """
    rounds: list[list[EmbedMessage]] = [[]]
    for target, wanted in enumerate(requests):
        by_piece = [m for key, runs in wanted.items() for m in _messages(pieces[key], per_patch[key], runs, target)]
        rounds[0] += [m for part in by_piece for m in part if m.source == target]
        remote = [part for part in by_piece if part and part[0].source != target]
        remote.sort(key=lambda part: (part[0].source - target) % len(requests))
        rounds += [[] for _ in range(len(remote) - len(rounds) + 1)]
        for number, part in enumerate(remote, 1):
            rounds[number] += part
    return rounds


def _messages(
    pieces: Sequence[EncodeChunk], per_patch: int, runs: Sequence[Run], target: int
) -> list[list[EmbedMessage]]:
    """The messages that bring `runs` of one video, by piece."""
    result = []
    for piece in pieces:
        first, last = piece.start * per_patch, piece.stop * per_patch
        at, part = 0, []
        for start, stop in runs:
            low, high = max(start, first), min(stop, last)
            if low < high:
                part.append(EmbedMessage(piece, low - first, high - first, piece.owner, target, at + low - start))
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
    """One round: send `outgoing(m)` of what this rank has and receive into `incoming(m)`; returns the bytes received.

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
