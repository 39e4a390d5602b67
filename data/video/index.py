# SPDX-License-Identifier: Apache-2.0
"""What a video file holds: its packets, its frames, how it is shown.

A frame is known by its presentation timestamp: counts and rates in headers are often wrong. Where packets have no
usable timestamps, frames are known by number (`VideoIndex.by_number`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo


@dataclass(frozen=True, slots=True, eq=False)
class VideoHeader:
    """What holds for the whole video.

    `display` is the part (a, b, c, d) of the display matrix that turns and mirrors, as signs. Timestamps are in units
    of `time_base` seconds.
    """

    path: str
    codec: str
    width: int
    height: int
    time_base: float
    average_fps: float
    display: tuple[int, int, int, int]
    colour_matrix: Literal["bt601", "bt709", "bt2020"]


@dataclass(frozen=True, slots=True, eq=False)
class VideoIndex(VideoHeader):
    """Packets in decoding order (P of them) and frames in presentation order (F)."""

    pts: np.ndarray
    """int64 [F] of the shown frames, ascending: as in the file, made good where it repeats one or goes back."""
    packet_of_frame: np.ndarray
    """int64 [F] number of the packet that holds frame i."""
    packet_pts: np.ndarray
    """int64 [P] of the picture in each packet, as in `pts`."""
    packet_stamp: np.ndarray
    """int64 [P] that the file gives each packet (`container.stamp`); any may occur twice."""
    is_key: np.ndarray
    """bool [P]: decoding can start here."""
    is_shown: np.ndarray
    """bool [P]: gives a frame (neither hidden nor cut away by an edit list)."""
    is_droppable: np.ndarray
    """bool [P]: no other picture refers to it."""
    by_number: bool = False
    """No timestamps to go by: frame i is the i-th one that a decoder gives from the beginning."""

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) as shown, the display matrix applied."""
        return (self.height, self.width) if self.turn[0] else (self.width, self.height)

    @property
    def turn(self) -> tuple[bool, bool, bool]:
        """(rows and columns change places, then upside down, then left to right): how to show a stored picture."""
        a, b, c, d = self.display
        return (True, b < 0, c < 0) if a == 0 else (False, d < 0, a < 0)

    def info(self) -> VideoInfo:
        seconds = (self.pts - self.pts[0]) * self.time_base
        return VideoInfo(self.path, self.codec, *self.shown_size, tuple(seconds.tolist()), self.average_fps)

    def sorted_unique(self, frames: Iterable[int]) -> list[int]:
        """The frame numbers, each once. Raises VideoDecodeError for one that the video does not have."""
        wanted = sorted(set(frames))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise VideoDecodeError(
                self.path, f"frames {wanted[0]}..{wanted[-1]} asked for, it has {self.num_frames} (0 to the last)"
            )
        return wanted
