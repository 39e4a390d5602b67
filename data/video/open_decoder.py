# SPDX-License-Identifier: Apache-2.0
"""The video decoder for a device."""

from __future__ import annotations

from typing import Literal

from data.video.index_store import IndexStore
from megatron_rl.protocols import VideoDecoder


def build_video_decoder(
    device: Literal["cpu", "gpu"], num_threads: int, indexes: IndexStore | None = None
) -> VideoDecoder:
    """On a GPU DALI with NVDEC. On a CPU libavcodec and torch, whose resize costs a fraction of DALI's there.

    `indexes` keeps what one pass over a file tells.
    """
    if device == "gpu":
        from data.video.dali import DaliVideoDecoder

        return DaliVideoDecoder(device, num_threads, indexes)
    from data.video.pixels import CpuVideoDecoder

    return CpuVideoDecoder(num_threads, indexes)
