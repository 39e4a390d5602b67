# SPDX-License-Identifier: Apache-2.0
"""What has to be read from a file so that chunks of an item can be encoded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from data.video.prefetch import FrameRequest, MediaRequest, SoundRequest
from megatron_rl.media.routes import EncodeChunk
from megatron_rl.types import DECODED_BYTES, MediaItem

Work = tuple[MediaRequest, tuple[EncodeChunk, ...]]  # what is read together, and the chunks that it makes


def media_requests(item: MediaItem, chunks: Sequence[EncodeChunk]) -> list[Work]:
    """The frames of the chunks, read together as far as DECODED_BYTES allows; of sound, one stretch from the first
    chunk to the last that follows it without a gap."""
    if item.kind == "audio":
        return [_sound(item, together) for together in _stretches(chunks)]
    max_units = max(1, DECODED_BYTES // (item.frames_per_unit * 3 * item.size_hw[0] * item.size_hw[1]))
    work: list[Work] = []
    for _, group in groupby(chunks, key=lambda c: (c.start - chunks[0].start) // max_units):
        together = tuple(group)
        ranges = [item.frames_of(c.start, c.stop) for c in together]
        frames = tuple(index for first, last in ranges for index in item.frame_indices[first:last])
        work.append((FrameRequest(item.path, frames, item.size_hw, item.kind), together))
    return work


def _sound(item: MediaItem, together: tuple[EncodeChunk, ...]) -> Work:
    first, last = item.frames_of(together[0].start, together[-1].stop)
    return SoundRequest(item.path, item.span, first, last, item.size_hw[1]), together


def _stretches(chunks: Sequence[EncodeChunk]) -> list[tuple[EncodeChunk, ...]]:
    """Chunks that follow each other without a gap, together."""
    stretches: list[tuple[EncodeChunk, ...]] = []
    for chunk in chunks:
        if stretches and stretches[-1][-1].stop == chunk.start:
            stretches[-1] = (*stretches[-1], chunk)
        else:
            stretches.append((chunk,))
    return stretches


def num_patches(item: MediaItem, chunk: EncodeChunk) -> int:
    """What the encoder works through: patches of pictures before they are merged, columns of a spectrogram."""
    if item.kind == "audio":
        first, last = item.frames_of(chunk.start, chunk.stop)
        return last - first
    return (chunk.stop - chunk.start) * item.grid_thw[1] * item.grid_thw[2]
