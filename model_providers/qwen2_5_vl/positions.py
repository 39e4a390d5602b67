# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions of Qwen2.5-VL.

Text counts up in all three rows. A video token at (t, h, w) of its grid stands at start + (int(t * seconds_per_grid *
tokens_per_second), h, w), and text goes on at the largest position so far plus one: the convention of the original
release and of vLLM. (transformers 5 continues at start + max(h, w) instead, which differs once time outgrows space.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.protocols import PositionRule
from megatron_rl.types import MediaItem, Run


def positions_of(config: Mapping[str, Any]) -> PositionRule:
    """The rule of a checkpoint."""
    vision = config["vision_config"]
    merge_size, rate = vision["spatial_merge_size"], float(vision.get("tokens_per_second", 4))
    return partial(rope_positions, merge_size=merge_size, tokens_per_second=rate)


def rope_positions(
    num_tokens: int,
    media: Sequence[MediaItem],
    spans: Sequence[Sequence[Run]],
    *,
    merge_size: int,
    tokens_per_second: float,
) -> Tensor:
    """int64 [3, num_tokens]; `spans[i]` is the one run of tokens that `media[i]` fills."""
    parts: list[np.ndarray] = []
    index = position = 0
    for item, [(start, stop)] in zip(media, spans, strict=True):
        parts.append(_text(start - index, position))
        position += start - index
        grid = _grid(item, merge_size, tokens_per_second) + position
        parts.append(grid)
        index = stop
        position = int(grid.max()) + 1
    parts.append(_text(num_tokens - index, position))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _text(length: int, position: int) -> np.ndarray:
    return np.broadcast_to(np.arange(position, position + length, dtype=np.int64), (3, length))


def _grid(item: MediaItem, merge_size: int, tokens_per_second: float) -> np.ndarray:
    t, h, w = item.grid_thw
    grid = np.indices((t, h // merge_size, w // merge_size), dtype=np.int64)
    seconds = float(np.float32(item.seconds_per_grid))  # the engine receives it as float32
    grid[0] = (grid[0] * (seconds * tokens_per_second)).astype(np.int64)
    return grid.reshape(3, -1)
