# SPDX-License-Identifier: Apache-2.0
"""A video that is there as its frames: picture files in their order, at a rate.

Such a video is one small JSON file that lists the pictures, so that it has a path, an identity and an index like any
other video; `FrameFilesDecoder` reads it. The name of the file changes when a picture does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from data.video.images import decode_image, probe_image
from megatron_rl.errors import VideoDecodeError
from megatron_rl.protocols import VideoDecoder
from megatron_rl.runtime.files import write_atomically
from megatron_rl.types import VideoInfo

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_FPS = 2.0
"""Frames a second of a list that does not say: the rate at which Qwen's processors sample a video."""

_SUFFIX = ".frames"
_PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"))


@dataclass(frozen=True, slots=True)
class FrameFiles:
    """Absolute paths of the pictures, in order, and how many of them pass in a second."""

    paths: tuple[str, ...]
    fps: float


def frames_in(folder: str) -> tuple[str, ...]:
    """The pictures of a folder, by name; numbers in names count as numbers: f2 comes before f10."""
    names = [name for name in os.listdir(folder) if PurePath(name).suffix.lower() in _PICTURES]
    return tuple(os.path.join(folder, name) for name in sorted(names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def write_frame_list(frames: FrameFiles, folder: Path) -> str:
    """The path of the list, a file in `folder` that is written where it is not there yet."""
    content = json.dumps({"fps": frames.fps, "frames": frames.paths, "states": [_state(path) for path in frames.paths]})
    names = json.dumps([frames.fps, [PurePath(path).name for path in frames.paths]])
    path = folder / f"{_digest(names)}-{_digest(content)}{_SUFFIX}"
    if not path.exists():
        try:
            write_atomically(path, content.encode())
        except OSError as error:
            raise ValueError(f"run_dir={folder.parent}: a list of frames cannot be written there ({error})") from error
    return str(path)


def frames_of(path: str) -> FrameFiles | None:
    """What `write_frame_list` has written to `path`; None for any other path. Raises VideoDecodeError."""
    if not path.endswith(_SUFFIX):
        return None
    try:
        listed = json.loads(Path(path).read_bytes())
        return FrameFiles(tuple(listed["frames"]), listed["fps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VideoDecodeError(path, f"no readable list of frames ({error})") from error


def lasting_name(path: str) -> str:
    """The name of a medium that stays when its folder moves or its pictures are copied."""
    name = PurePath(path).name
    return name.partition("-")[0] if name.endswith(_SUFFIX) else name


def shown_path(path: str) -> str:
    """The path that means something to the user: for a list of frames that of their folder."""
    frames = frames_of(path)
    return os.path.dirname(frames.paths[0]) if frames else path


def _state(path: str) -> tuple[int, int]:
    """(size, mtime_ns), (-1, 0) for a file that is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FrameFilesDecoder:
    """A VideoDecoder of lists of frames; any other path is left to `videos`."""

    def __init__(self, videos: VideoDecoder):
        self._videos = videos

    def probe(self, path: str) -> VideoInfo:
        """The first picture tells the size of all. Raises VideoDecodeError."""
        frames = frames_of(path)
        if frames is None:
            return self._videos.probe(path)
        first = probe_image(frames.paths[0])
        times = tuple(number / frames.fps for number in range(len(frames.paths)))
        return VideoInfo(path, first.codec, first.width, first.height, times, frames.fps)

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        """uint8 RGB [F, 3, height, width]. Any order, repeats allowed. Raises VideoDecodeError."""
        frames = frames_of(path)
        if frames is None:
            return self._videos.decode(path, frame_indices, size_hw)
        import torch

        size = _size(frames.paths[0])
        pictures: dict[int, Tensor] = {}
        for index in frame_indices:
            picture = frames.paths[index]
            if index not in pictures:
                if _size(picture) != size:
                    raise VideoDecodeError(picture, f"is {_size(picture)} pixels, the first frame {size}")
                pictures[index] = decode_image(picture, 1, size_hw)[0]
        return torch.stack([pictures[index] for index in frame_indices])


def _size(path: str) -> tuple[int, int]:
    info = probe_image(path)
    return info.width, info.height
