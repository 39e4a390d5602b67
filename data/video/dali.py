# SPDX-License-Identifier: Apache-2.0
"""The VideoDecoder of machines with a GPU: one DALI pipeline decodes (NVDEC) and resizes there, and frames stay there.

DALI's decoder never seeks, so it gets a clip of just the packets of the plan (clip.py). It knows neither the stream's
colour matrix (always BT.601) nor its rotation: both are made good afterwards. The only module that imports DALI.
On a CPU the same pipeline decodes VP8, VP9 and MJPEG, which is how it is tested; nothing here was run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIInterpType

from data.video.clip import Clip, clip_parts, cut_clip
from data.video.gop_plan import plan_runs
from data.video.index import VideoIndex
from data.video.index_store import IndexStore, index_video
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

# Full-size frames in memory at once: 8192 frames of 720p together would be 22 GiB.
_CALL_BYTES = 2 << 30
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # weights of red and blue


@pipeline_def
def _frames_pipeline(on_gpu: bool) -> DataNode:
    encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
    positions = fn.external_source(name="positions", dtype=DALIDataType.INT32, ndim=1)
    size_hw = fn.external_source(name="size_hw", dtype=DALIDataType.FLOAT, ndim=1)
    # pad_mode "none": an index past the end is an error; by default it would be a black frame.
    video = fn.decoders.video(encoded, device="mixed" if on_gpu else "cpu", frames=positions, pad_mode="none")
    resized = fn.resize(video, size=size_hw, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    assert isinstance(resized, DataNode), "one input gives one output"
    return fn.transpose(resized, perm=[0, 3, 1, 2])


class DaliVideoDecoder:
    """Frames by index, resized, on `device`."""

    def __init__(self, device: Literal["cpu", "gpu"], num_threads: int, indexes: IndexStore | None = None):
        self._on_gpu = device == "gpu"
        self._num_threads, self._indexes = num_threads, indexes
        self._pipeline: Pipeline | None = None
        self._device_id = torch.cuda.current_device() if self._on_gpu else None  # of this thread; others have their own
        self._lock = threading.Lock()

    def probe(self, path: str) -> VideoInfo:
        return index_video(path, self._indexes).info()

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> torch.Tensor:
        """uint8 RGB [F, 3, height, width]. Any order, repeats allowed."""
        assert len(frame_indices)
        index = index_video(path, self._indexes)
        if index.by_number:
            raise VideoDecodeError(path, "frames without timestamps (a raw stream?); remux it to mp4")
        stored_hw = size_hw[::-1] if index.turn[0] else size_hw
        rows: dict[int, torch.Tensor] = {}
        room = max(_CALL_BYTES // (index.width * index.height * 3), 1)
        for runs in clip_parts(index, plan_runs(index, index.sorted_unique(frame_indices)), room):
            clip = cut_clip(index, runs)
            with self._lock:
                rows |= zip(clip.frames, self._run(index, clip, stored_hw), strict=True)
        frames = torch.stack([rows[frame] for frame in frame_indices])
        return upright(recolour(frames, index.colour_matrix), index.turn)

    def _run(self, index: VideoIndex, clip: Clip, size_hw: tuple[int, int]) -> torch.Tensor:
        """One clip through the pipeline. The tensor keeps DALI's buffer alive; later runs do not overwrite it."""
        if self._pipeline is None:
            self._pipeline = self._build()
        self._pipeline.feed_input("encoded", [clip.data])
        self._pipeline.feed_input("positions", [np.asarray(clip.positions, np.int32)])
        self._pipeline.feed_input("size_hw", [np.asarray(size_hw, np.float32)])
        try:
            (frames,) = self._pipeline.run()
        except RuntimeError as error:  # DALI raises nothing more specific
            self._pipeline = None  # "Current pipeline object is no longer valid"
            raise VideoDecodeError(index.path, _reason(index, error)) from error
        tensor = torch.from_dlpack(frames.as_tensor())[0]
        if len(tensor) != len(clip.positions):
            raise VideoDecodeError(
                index.path, f"corrupt: DALI gave {len(tensor)} frames of {len(clip.positions)} asked for"
            )
        return tensor

    def _build(self) -> Pipeline:
        pipeline = _frames_pipeline(
            self._on_gpu,
            batch_size=1,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


def recolour(frames: torch.Tensor, matrix: str) -> torch.Tensor:
    """uint8 [F, 3, H, W] that was made with BT.601, as if it had been made with `matrix` (but for clipped colours)."""
    if matrix == "bt601":
        return frames
    step = (_yuv_to_rgb(*_LUMA[matrix]) @ torch.linalg.inv(_yuv_to_rgb(*_LUMA["bt601"]))).to(frames.device)
    return torch.cat(
        [torch.einsum("rc,fchw->frhw", step, f[None].float()).round().clamp(0, 255).byte() for f in frames]
    )


def _yuv_to_rgb(red: float, blue: float) -> torch.Tensor:
    """ITU-R BT.601/709/2020: RGB of (Y', Cb, Cr)."""
    green = 1 - red - blue
    return torch.tensor(
        [
            [1.0, 0.0, 2 * (1 - red)],
            [1.0, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1.0, 2 * (1 - blue), 0.0],
        ]
    )


def upright(frames: torch.Tensor, turn: tuple[bool, bool, bool]) -> torch.Tensor:
    """[F, 3, H, W] turned and mirrored as VideoIndex.turn says."""
    transposed, flip_y, flip_x = turn
    frames = frames.transpose(2, 3) if transposed else frames
    dims = [dim for dim, flipped in ((2, flip_y), (3, flip_x)) if flipped]
    return frames.flip(dims) if dims else frames.contiguous()


def _reason(index: VideoIndex, error: RuntimeError) -> str:
    """DALI's message is a page; its sentence about the cause stands first or after "Error"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith(("Error", "[", "Failed", "Unexpected"))), lines[-1])
    return f"corrupt: DALI cannot decode this {index.codec} video (or does not support the codec): {cause}"
