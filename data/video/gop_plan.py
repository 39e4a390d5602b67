# SPDX-License-Identifier: Apache-2.0
"""Which packets have to be decoded to get the wanted frames: no group of pictures without one, none past the last.

Pure arithmetic on a VideoIndex. P packets, in decoding order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.video.index import VideoIndex


@dataclass(frozen=True, slots=True)
class GopRun:
    """Decode packets `start` (a keyframe) up to `stop`, leaving out those that nothing refers to.

    `wanted` maps presentation timestamps to frame numbers. `num_decoded` counts the packets that the decoder gets.
    """

    start: int
    stop: int
    wanted: dict[int, int]
    num_decoded: int


def plan_runs(index: VideoIndex, frames: Sequence[int]) -> list[GopRun]:
    """The runs that give these frames (ascending, each once), in decoding order."""
    wanted = np.asarray(frames, np.int64)
    packets, pts = index.packet_of_frame[wanted], index.pts[wanted]
    starts = _start_of(index, packets, pts)
    decodable = ~index.is_droppable
    runs = []
    for start in np.unique(starts):
        here = starts == start
        stop = int(packets[here].max()) + 1
        num_decoded = int(decodable[start:stop].sum() + index.is_droppable[packets[here]].sum())
        members = dict(zip(pts[here].tolist(), wanted[here].tolist(), strict=True))
        runs.append(GopRun(int(start), stop, members, num_decoded))
    return runs


def _start_of(index: VideoIndex, packets: np.ndarray, pts: np.ndarray) -> np.ndarray:
    """For each picture the last keyframe that stands before it in the file and is not shown after it.

    Pictures of an open group stand behind a keyframe and are shown before it: they need the group before.
    """
    keys = np.flatnonzero(index.is_key)
    position = np.searchsorted(keys, packets, side="right") - 1
    while (late := (index.packet_pts[keys[position]] > pts) & (position > 0)).any():
        position[late] -= 1
    return keys[position]


def earlier_start(index: VideoIndex, run: GopRun, num_keys: int) -> GopRun:
    """The same run from `num_keys` keyframes before."""
    keys = np.flatnonzero(index.is_key)
    start = int(keys[max(int(np.searchsorted(keys, run.start)) - num_keys, 0)])
    extra = int((~index.is_droppable[start : run.start]).sum())
    return GopRun(start, run.stop, run.wanted, run.num_decoded + extra)


def split_runs(runs: Sequence[GopRun], num_parts: int) -> list[list[GopRun]]:
    """Contiguous, about equally expensive parts; fewer where there are fewer runs."""
    total = sum(run.num_decoded for run in runs)
    parts: list[list[GopRun]] = [[] for _ in range(num_parts)]
    done = 0.0
    for run in runs:
        middle = done + run.num_decoded / 2
        parts[min(int(middle * num_parts / total), num_parts - 1)].append(run)
        done += run.num_decoded
    return [part for part in parts if part]
