# SPDX-License-Identifier: Apache-2.0
"""From decoded pictures to RGB tensors on the CPU: colour, rotation, size.

Colour matrix and range are those of the stream's tags; a stream without tags is BT.601, as for every player built on
libswscale. The resize is the one that transformers' video processors call (bicubic, antialiased, on uint8), so frames
are bit-equal to theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.nn.functional import interpolate

from data.video.decode import Slots, decode_frames
from data.video.index import VideoIndex
from data.video.index_store import IndexStore, index_video
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo


class RgbConverter:
    """Pictures of one video as RGB arrays; one converter per thread."""

    def __init__(self, index: VideoIndex):
        self._index = index
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [height, width, 3] as shown, of the size of the first picture: a view, good until the frame goes."""
        width, height = self._index.width, self._index.height  # a later picture may differ: scaled as FFmpeg does
        try:
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        except av.FFmpegError as error:
            raise VideoDecodeError(
                self._index.path, f"pictures of the format {frame.format.name} cannot be turned into RGB"
            ) from error
        return upright(rgb, self._index.turn)


def upright(rgb: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """The picture turned and mirrored as VideoIndex.turn says; a view."""
    transposed, flip_y, flip_x = turn
    rgb = rgb.swapaxes(0, 1) if transposed else rgb
    return rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def resize(rgb: np.ndarray, size_hw: tuple[int, int]) -> torch.Tensor:
    """uint8 [height, width, 3] -> uint8 [3, H, W]."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    if rgb.shape[:2] == size_hw:
        return pixels
    return interpolate(pixels[None], size_hw, mode="bicubic", antialias=True)[0]


class CpuVideoDecoder:
    """The VideoDecoder of machines without a GPU. Full-size pictures never outlive their turn in a thread.

    At most `num_threads` threads decode at a time, on one long video or on several short ones: `decode` may be called
    from several threads.
    """

    def __init__(self, num_threads: int, indexes: IndexStore | None = None):
        self._num_threads, self._indexes = num_threads, indexes
        self._slots = threading.Semaphore(num_threads)

    def probe(self, path: str) -> VideoInfo:
        return index_video(path, self._indexes).info()

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> torch.Tensor:
        """uint8 RGB [F, 3, height, width]. Any order, repeats allowed."""
        out = torch.empty((len(frame_indices), 3, *size_hw), dtype=torch.uint8)
        self.decode_into(out, path, frame_indices)
        return out

    def decode_into(self, out: torch.Tensor, path: str, frame_indices: Sequence[int]) -> None:
        """As `decode`, into uint8 [F, 3, height, width] that is already there."""
        size_hw = (out.shape[2], out.shape[3])

        def store(rows: Sequence[int], rgb: np.ndarray) -> None:
            frame = resize(rgb, size_hw)
            for row in rows:  # indexing with a list would copy many times slower
                out[row] = frame

        _store_frames(index_video(path, self._indexes), frame_indices, self._num_threads, store, self._slots)


def read_frames(path: str, frames: Sequence[int], num_threads: int = 1) -> np.ndarray:
    """uint8 RGB [F, height, width, 3] at full size: any order, repeats allowed. Raises VideoDecodeError."""
    index = index_video(path)
    width, height = index.shown_size
    # Not from NumPy: it asks for huge pages, and putting those together can take as long as decoding does.
    out = torch.empty((len(frames), height, width, 3), dtype=torch.uint8).numpy()

    def store(rows: Sequence[int], rgb: np.ndarray) -> None:
        for row in rows:
            out[row] = rgb

    _store_frames(index, frames, num_threads, store)
    return out


def _store_frames(
    index: VideoIndex,
    frames: Sequence[int],
    num_threads: int,
    store: Callable[[Sequence[int], np.ndarray], None],
    slots: Slots | None = None,
) -> None:
    """Call `store` with each wanted picture and the rows in which it is wanted, from several threads."""
    rows: dict[int, list[int]] = {}
    for row, frame in enumerate(frames):
        rows.setdefault(frame, []).append(row)
    local = threading.local()

    def deliver(number: int, frame: av.VideoFrame) -> None:
        if not hasattr(local, "to_rgb"):
            local.to_rgb = RgbConverter(index)
        store(rows[number], local.to_rgb(frame))

    decode_frames(index, frames, num_threads, deliver, slots)
