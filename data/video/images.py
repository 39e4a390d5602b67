# SPDX-License-Identifier: Apache-2.0
"""Still pictures: read with Pillow, turned upright by their EXIF tag, resized as transformers' processors do.

An image travels like a video of one picture: the tower sees it as one temporal patch, whose frames are all alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from data.video.regular_file import regular_file
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

if TYPE_CHECKING:
    import torch

_STRIP_PIXELS = 1 << 22
_RUN_BY_PROGRAMS = frozenset({"EPS"})


def probe_image(path: str) -> VideoInfo:
    """Size as shown. Raises VideoDecodeError for what is no image."""
    with _reading(path) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientation: stored on its side
            width, height = height, width
        return VideoInfo(path, f"image/{(image.format or 'unknown').lower()}", width, height, (0.0,))


def decode_image(path: str, num_frames: int, size_hw: tuple[int, int]) -> torch.Tensor:
    """uint8 RGB [F, 3, height, width], all frames the same picture, white behind what is transparent.

    Raises VideoDecodeError.
    """
    import torch  # here: a recipe is checked without

    from data.video.pixels import resize

    height, width = size_hw
    with _reading(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.width * image.height <= _STRIP_PIXELS:
            frame = resize(_pixels(image), size_hw)
        else:
            # A resize works along the rows first, so a part of them may go by itself: no more than one strip of a huge
            # picture is in memory in several forms.
            narrow = torch.cat([resize(strip, (len(strip), width)) for strip in _strips(image)], dim=1)
            frame = resize(narrow.permute(1, 2, 0).numpy(), size_hw)
    return frame.expand(num_frames, 3, -1, -1).contiguous()


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield _pixels(image.crop((0, top, image.width, min(top + rows, image.height))))


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 RGB [height, width, 3]."""
    return np.array(_on_white(_eight_bits(image)))


def _on_white(image: Image.Image) -> Image.Image:
    """As RGB; white behind what is transparent, as vLLM serves it (transformers' processors drop alpha). Of a picture
    that is RGB already, one colour may be named as transparent: it stays, there as here."""
    if image.mode == "RGB" or not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    shown = Image.new("RGB", image.size, (255, 255, 255))
    shown.paste(layer, mask=layer.getchannel("A"))
    return shown


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture with 256 levels: Pillow itself would cut everything above 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its numbers (Pillow's mode {image.mode}) have no stated range; convert it to 8 bits")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's, without those that it hands to another program (Ghostscript)."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _RUN_BY_PROGRAMS)


class _reading:
    """Opens an image; what is wrong with the file, on opening or in the block, becomes a VideoDecodeError."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> Image.Image:
        regular_file(self._path)
        try:
            self._image = Image.open(self._path, formats=_formats())
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
