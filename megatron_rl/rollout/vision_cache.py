# SPDX-License-Identifier: Apache-2.0
"""Every video is decoded and encoded once a step: its frames split over all ranks, the pieces fetched by who needs
them.

`encode` leaves each piece on the rank that made it; `fetch` moves pieces to the ranks that ask (the rollout replica
before generation, the trainer's first stage before the passes). A faulty file fails for all ranks alike and is
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.prefetch import FramePrefetcher, FrameRequest
from megatron_rl.errors import VideoDecodeError
from megatron_rl.protocols import VideoTower
from megatron_rl.types import VideoArtifact

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Temporal patches [start, stop) of a video, encoded by `owner`."""

    key: str
    start: int
    stop: int
    owner: int


class VisionCache:
    """Embeddings of the current step. Without a tower, it refuses every video."""

    def __init__(self, tower: VideoTower | None, frames: FramePrefetcher, hidden_size: int, blank: bool = False):
        self._tower, self._frames, self._hidden = tower, frames, hidden_size
        self._blank = blank
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._pieces: dict[str, list[Piece]] = {}
        self._made: dict[tuple[str, int], Tensor] = {}
        self._failed: dict[str, str] = {}

    def blanked(self) -> VisionCache:
        """A second cache over the same tower, which sees black frames."""
        return VisionCache(self._tower, self._frames, self._hidden, blank=True)

    def forget(self) -> None:
        """Drop all embeddings: the step they were made for is over."""
        self._pieces, self._made, self._failed = {}, {}, {}

    def prefetch(self, videos: Sequence[VideoArtifact]) -> None:
        """Decode this rank's share of the videos of a batch to come in the background, instead of any before."""
        unique = list({v.key: v for v in videos}.values())
        own = self._own(unique, split_over_ranks(unique, self._world))
        self._frames.drop()
        self._frames.ask([request for video, piece in own for request in frame_requests(video, piece)])

    def close(self) -> None:
        """Nothing more will be encoded: do not decode what was asked for."""
        self._frames.drop()

    def encode(self, videos: Sequence[VideoArtifact]) -> dict[str, str]:
        """Encode what is not there yet (equal keys once). Returns {key: reason} of those videos that cannot be used.

        Collective; `videos` is the same on every rank.
        """
        if videos and self._tower is None:
            raise ValueError(f"{videos[0].path}: this model takes no video; use a model that does")
        unique = self._new(videos)
        pieces = split_over_ranks(unique, self._world)
        own = self._own(unique, pieces)
        self._pieces |= pieces
        self._frames.ask([request for video, piece in own for request in frame_requests(video, piece)])
        failed: dict[str, str] = {}
        for video, piece in own:
            try:
                self._made[piece.key, piece.start] = self._encode_piece(video, piece)
            except VideoDecodeError as error:
                failed[video.key] = error.reason
        self._failed |= self._agree_on_failures(failed)
        return {v.key: self._failed[v.key] for v in videos if v.key in self._failed}

    def fetch(self, videos: Sequence[VideoArtifact]) -> dict[str, Tensor]:
        """{key: [num_tokens, H]} of the videos this rank asks for. Collective; every rank may ask for other videos."""
        wanted = {v.key: v for v in videos}
        requests: list[list[str]] = [[] for _ in range(self._world)]
        dist.all_gather_object(requests, list(wanted))
        operations, arriving = [], {}
        for peer, keys in enumerate(requests):
            for key in keys:
                for piece in self._pieces[key]:
                    if piece.owner == self._rank != peer:
                        operations.append(dist.P2POp(dist.isend, self._made[key, piece.start], peer))
        for key, video in wanted.items():
            for piece in self._pieces[key]:
                if piece.owner != self._rank:
                    arriving[key, piece.start] = self._empty(video, piece)
                    operations.append(dist.P2POp(dist.irecv, arriving[key, piece.start], piece.owner))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        have = self._made | arriving
        return {key: torch.cat([have[key, p.start] for p in self._pieces[key]]) for key in wanted}

    def _own(
        self, videos: Sequence[VideoArtifact], pieces: dict[str, list[Piece]]
    ) -> list[tuple[VideoArtifact, Piece]]:
        """What this rank encodes."""
        return [(video, piece) for video in videos for piece in pieces[video.key] if piece.owner == self._rank]

    def _new(self, videos: Sequence[VideoArtifact]) -> list[VideoArtifact]:
        return list({v.key: v for v in videos if v.key not in self._pieces}.values())

    def _encode_piece(self, video: VideoArtifact, piece: Piece) -> Tensor:
        """In chunks, so that full-size activations do not grow with the length of a video. All are taken, whatever
        comes of the first, so that none stays behind."""
        embeds, error = [], None
        for request in frame_requests(video, piece):
            try:
                frames = self._frames.take(request)
            except VideoDecodeError as found:
                error = error or found
                continue
            if error is None:
                embeds.append(self._tower.encode(torch.zeros_like(frames) if self._blank else frames))
        if error is not None:
            raise error
        return torch.cat(embeds)

    def _empty(self, video: VideoArtifact, piece: Piece) -> Tensor:
        rows = video.num_tokens // video.grid_thw[0] * (piece.stop - piece.start)
        return torch.empty(rows, self._hidden, dtype=self._tower.dtype, device=self._tower.device)

    def _agree_on_failures(self, failed: dict[str, str]) -> dict[str, str]:
        everyone: list[dict[str, str]] = [{} for _ in range(self._world)]
        dist.all_gather_object(everyone, failed)
        return {key: reason for part in everyone for key, reason in part.items()}


def frame_requests(video: VideoArtifact, piece: Piece) -> list[FrameRequest]:
    """The frames of a piece in chunks of whole temporal patches, about _CHUNK_BYTES each."""
    patch = len(video.frame_indices) // video.grid_thw[0]
    per_patch = patch * 3 * video.size_hw[0] * video.size_hw[1]
    step = max(_CHUNK_BYTES // per_patch, 1)
    return [
        FrameRequest(
            video.path,
            video.frame_indices[start * patch : min(start + step, piece.stop) * patch],
            video.size_hw,
            video.is_image,
        )
        for start in range(piece.start, piece.stop, step)
    ]


def split_over_ranks(videos: Sequence[VideoArtifact], world: int) -> dict[str, list[Piece]]:
    """Cut all temporal patches of a batch into `world` contiguous, equally expensive shares.

    Contiguous, so that a rank decodes a stretch of few videos and does not seek all over every file.
    """
    total = sum(v.num_tokens for v in videos)
    pieces: dict[str, list[Piece]] = {v.key: [] for v in videos}
    done = 0
    for video in videos:
        grid_t = video.grid_thw[0]
        per_patch = video.num_tokens // grid_t
        start = 0
        while start < grid_t:
            owner = min((done * world) // total, world - 1)
            room = -(-((owner + 1) * total - done * world) // (world * per_patch)) if owner < world - 1 else grid_t
            stop = min(grid_t, start + max(1, room))
            pieces[video.key].append(Piece(video.key, start, stop, owner))
            done += (stop - start) * per_patch
            start = stop
    return pieces
