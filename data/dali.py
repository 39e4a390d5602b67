# SPDX-License-Identifier: Apache-2.0
"""The video decoder of the project (protocol VideoDecoder): one DALI pipeline, on the GPU or on the CPU.

Frames come from DALI's own decoder, or, for what its CPU build cannot decode or would decode wastefully, from PyAV
(decoder.py). Everything after is the same DALI operators. The only module that imports DALI.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from data.decoder import Scan, iter_frames, scan
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

T = TypeVar("T")
Chunk = tuple[Sequence[int], torch.Tensor]  # frame indices, uint8 [F, 3, height, width]

# Full-size frames in memory at once: 8192 frames of 720p together would be 22 GiB.
_PYAV_CHUNK_BYTES = 64 << 20
_NATIVE_CALL_BYTES = 2 << 30
# DALI's decoder never seeks: it decodes from frame 0 to the last wanted one. On the CPU PyAV takes over where seeking
# saves more than this factor. On the GPU nothing else decodes, and NVDEC reads through a long clip in seconds.
_NATIVE_MAX_WASTE = 1.5


@pipeline_def
def _frames_pipeline(native: bool, on_gpu: bool) -> DataNode:
    if native:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
        # pad_mode "none": an index past the end is an error; by default it would be a black frame.
        video = fn.decoders.video(encoded, device="mixed" if on_gpu else "cpu", frames=indices, pad_mode="none")
    else:
        video = fn.external_source(name="video", dtype=types.UINT8, ndim=4, layout="FHWC")
    size_hw = fn.external_source(name="size_hw", dtype=types.FLOAT, ndim=1)
    video = fn.resize(video, size=size_hw, interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.transpose(video, perm=[0, 3, 1, 2])


class DaliVideoDecoder:
    """Frames by index, resized. On a GPU everything is decoded there (NVDEC) and the frames stay there."""

    def __init__(self, device: Literal["cpu", "gpu"], num_threads: int, native_codecs: frozenset[str]):
        self._on_gpu = device == "gpu"
        self._num_threads = num_threads
        self._native_codecs = native_codecs
        self._pipelines: dict[bool, Pipeline] = {}

    def probe(self, path: str) -> VideoInfo:
        return scan(path).info()

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> torch.Tensor:
        """uint8 RGB [F, 3, height, width]. Any order, repeats allowed."""
        assert len(frame_indices)
        found = scan(path)
        wanted = found.sorted_unique(frame_indices)
        source = self._native if self._is_native(found, wanted) else self._pyav
        row_of = {index: row for row, index in enumerate(wanted)}
        frames = _collect(source(found, wanted, size_hw), row_of)
        order = [row_of[index] for index in frame_indices]
        return frames if order == list(range(len(wanted))) else frames[order]

    def _is_native(self, found: Scan, wanted: Sequence[int]) -> bool:
        if self._on_gpu:
            return True
        return (
            found.codec in self._native_codecs
            and len(wanted) <= _frames_within(_NATIVE_CALL_BYTES, found)
            and wanted[-1] + 1 <= _NATIVE_MAX_WASTE * found.num_decoded(wanted)
        )

    def _native(self, found: Scan, wanted: Sequence[int], size_hw: tuple[int, int]) -> Iterator[Chunk]:
        """DALI decodes. As few calls as memory allows, since each one starts at frame 0."""
        encoded = np.fromfile(found.path, np.uint8)
        for part in _batched(wanted, _frames_within(_NATIVE_CALL_BYTES, found)):
            feeds = {"encoded": encoded, "indices": np.asarray(part, np.int32)}
            try:
                frames = self._run(True, feeds, size_hw)
            except RuntimeError as error:  # DALI raises nothing more specific
                del self._pipelines[True]  # "Current pipeline object is no longer valid"
                raise VideoDecodeError(found.path, _reason(found, error)) from error
            if len(frames) != len(part):
                raise VideoDecodeError(found.path, f"truncated: DALI gave {len(frames)} frames of {len(part)}")
            yield part, frames

    def _pyav(self, found: Scan, wanted: Sequence[int], size_hw: tuple[int, int]) -> Iterator[Chunk]:
        """PyAV decodes; a decoding run goes on across chunks. A RuntimeError here is ours, not the file's."""
        decoded = iter_frames(found, wanted, self._num_threads)
        for part in _batched(decoded, _frames_within(_PYAV_CHUNK_BYTES, found)):
            indices, frames = zip(*part, strict=True)
            yield indices, self._run(False, {"video": np.stack(frames)}, size_hw)

    def _run(self, native: bool, feeds: dict[str, np.ndarray], size_hw: tuple[int, int]) -> torch.Tensor:
        """One clip through the pipeline. The tensor keeps DALI's buffer alive; later runs do not overwrite it."""
        pipeline = self._pipelines.get(native)
        if pipeline is None:
            pipeline = self._pipelines[native] = self._build(native)
        for name, array in {**feeds, "size_hw": np.asarray(size_hw, np.float32)}.items():
            pipeline.feed_input(name, [array])
        (frames,) = pipeline.run()
        return torch.from_dlpack(frames.as_tensor())[0]

    def _build(self, native: bool) -> Pipeline:
        pipeline = _frames_pipeline(
            native,
            self._on_gpu,
            batch_size=1,
            num_threads=self._num_threads,
            device_id=torch.cuda.current_device() if self._on_gpu else None,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline


def _frames_within(num_bytes: int, found: Scan) -> int:
    return max(num_bytes // (found.width * found.height * 3), 1)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _collect(chunks: Iterator[Chunk], row_of: dict[int, int]) -> torch.Tensor:
    """All frames, each in its row; one chunk at a time, so that the clip is not held twice."""
    frames = None
    for indices, chunk in chunks:
        if frames is None:
            frames = chunk.new_empty((len(row_of), *chunk.shape[1:]))
        frames[[row_of[index] for index in indices]] = chunk
    assert frames is not None
    return frames


def _reason(found: Scan, error: RuntimeError) -> str:
    """DALI's message is a page; its sentence about the cause stands first or after "Error"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith(("Error", "[", "Failed", "Unexpected"))), lines[-1])
    return f"DALI cannot decode this {found.codec} video (damaged, or a codec it does not support): {cause}"
