# SPDX-License-Identifier: Apache-2.0
"""What the tests of the vision side share: frames without files, and the tower of a checkpoint in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.video.prefetch import FramePrefetcher
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.types import VideoInfo, VisionPart
from tests import tiny_policy as tp


class MadeFrames:
    """A decoder (protocol VideoDecoder) of files that do not exist: noise that depends on path, frame and size."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def probe(self, path: str) -> VideoInfo:
        raise AssertionError(f"{path}: nothing asks for this here")

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        self.num_decoded += len(frame_indices)
        return torch.stack([made_frame(path, index, size_hw) for index in frame_indices])


def made_frame(path: str, index: int, size_hw: tuple[int, int]) -> Tensor:
    seed = int.from_bytes(path.encode(), "big") % 2**31 + index
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size_hw), generator=generator, dtype=torch.uint8)


def open_cache(
    folder: Path, trained: frozenset[VisionPart] = frozenset(), frames_per_chunk: int = 8
) -> ParallelEncoder:
    """Over `folder`'s tower, in chunks so small that the samples of tiny_policy take several."""
    provider = tp.open_provider(folder)
    encoder = provider.build_encoder(tp.BACKEND, torch.device("cpu"), trained)
    assert encoder is not None
    return ParallelEncoder(encoder, FramePrefetcher(MadeFrames(), 0), frames_per_chunk=frames_per_chunk)
