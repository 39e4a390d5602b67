# SPDX-License-Identifier: Apache-2.0
"""Media that exist as numbers only."""

from __future__ import annotations

from megatron_rl.types import MediaItem


def made_video(
    key: str, grid_thw: tuple[int, int, int], tokens_per_unit: int, seconds_per_grid: float = 1.0
) -> MediaItem:
    """A video without a file and without frame numbers, two frames to a unit."""
    num_units = grid_thw[0]
    return MediaItem(
        key=key,
        path="",
        frame_indices=(),
        timestamps=(),
        size_hw=(0, 0),
        grid_thw=grid_thw,
        seconds_per_grid=seconds_per_grid,
        num_tokens=num_units * tokens_per_unit,
        num_frames=2 * num_units,
        frames_per_unit=2,
        tokens_per_unit=tokens_per_unit,
    )
