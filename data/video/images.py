# SPDX-License-Identifier: Apache-2.0
"""Still pictures: read with Pillow, turned upright by their EXIF tag, resized as transformers' processors do.

An image travels like a video of one picture: the tower sees it as one temporal patch, whose frames are all alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

if TYPE_CHECKING:
    import torch


def probe_image(path: str) -> VideoInfo:
    """Size as shown. Raises VideoDecodeError for what is no image."""
    with _reading(path) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientation: stored on its side
            width, height = height, width
        return VideoInfo(path, f"image/{(image.format or 'unknown').lower()}", width, height, (0.0,))


def decode_image(path: str, num_frames: int, size_hw: tuple[int, int]) -> torch.Tensor:
    """uint8 RGB [F, 3, height, width], all frames the same picture. Raises VideoDecodeError."""
    from data.video.pixels import resize  # with torch: a recipe is checked without

    with _reading(path) as image:
        rgb = np.array(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))
    return resize(rgb, size_hw).expand(num_frames, -1, -1, -1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture with 256 levels: Pillow itself would cut everything above 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its numbers (Pillow's mode {image.mode}) have no stated range; convert it to 8 bits")
    return image


class _reading:
    """Opens an image; what is wrong with the file, on opening or in the block, becomes a VideoDecodeError."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> Image.Image:
        try:
            self._image = Image.open(self._path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise self._refused(error) from error
        return self._image

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._image.close()
        # Pillow raises these, and SyntaxError for a broken PNG, depending on the format
        if isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError):
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> VideoDecodeError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return VideoDecodeError(self._path, f"not a readable image: {why}")
