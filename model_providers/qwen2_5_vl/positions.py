# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions of Qwen2.5-VL.

Text counts up in all three rows. A video token at (t, h, w) of its grid stands at start + (int(t * seconds_per_grid *
tokens_per_second), h, w), and text goes on at the largest position so far plus one: the convention of the original
release and of vLLM. (transformers 5 continues at start + max(h, w) instead, which differs once time outgrows space.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_rl.types import MediaItem


def rope_positions(
    num_tokens: int,
    video_starts: Sequence[int],
    videos: Sequence[MediaItem],
    merge_size: int,
    tokens_per_second: float,
) -> Tensor:
    """int64 [3, num_tokens]; `video_starts[i]` is the index of the first placeholder token of `videos[i]`."""
    parts: list[np.ndarray] = []
    index = position = 0
    for start, video in zip(video_starts, videos, strict=True):
        parts.append(_text(start - index, position))
        position += start - index
        grid = _grid(video, merge_size, tokens_per_second) + position
        parts.append(grid)
        index = start + video.num_tokens
        position = int(grid.max()) + 1
    parts.append(_text(num_tokens - index, position))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _text(length: int, position: int) -> np.ndarray:
    return np.broadcast_to(np.arange(position, position + length, dtype=np.int64), (3, length))


def _grid(video: MediaItem, merge_size: int, tokens_per_second: float) -> np.ndarray:
    t, h, w = video.grid_thw
    grid = np.indices((t, h // merge_size, w // merge_size), dtype=np.int64)
    seconds = float(np.float32(video.seconds_per_grid))  # the engine receives it as float32
    grid[0] = (grid[0] * (seconds * tokens_per_second)).astype(np.int64)
    return grid.reshape(3, -1)
