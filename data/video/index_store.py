# SPDX-License-Identifier: Apache-2.0
"""Indexes of video files, remembered until the file changes: by this process, and on disk by a run.

With an `IndexStore` one pass over a file serves all ranks, all epochs and what resumes the run. An entry belongs to one
state of one file, and to the libraries that read it; a damaged one is made again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.video.index import VideoHeader, VideoIndex
from data.video.index_reader import read_index
from data.video.regular_file import regular_file
from megatron_rl.runtime.files import write_atomically

_NUM_REMEMBERED = 128  # a two-hour film takes 3 MB
_FORMAT = 2
_ABOUT = (*(field.name for field in fields(VideoHeader) if field.name != "path"), "by_number")
_NUMBERS = ("pts", "packet_of_frame", "packet_pts", "packet_stamp")
_FLAGS = ("is_key", "is_shown", "is_droppable")


@dataclass(frozen=True, slots=True)
class IndexStore:
    """A folder of entries; a few KB for a video of ten minutes."""

    folder: Path

    def load(self, path: str, state: tuple[int, int]) -> VideoIndex | None:
        """The index of `path` as it was in `state` (size, mtime_ns); None where there is no sound entry."""
        try:
            with np.load(self._entry(path, state), allow_pickle=False) as entry:
                about: dict[str, Any] = json.loads(str(entry["about"]))
                about["display"] = tuple(about["display"])
                # Differences take a tenth of the room.
                about |= {name: np.cumsum(entry[name]) for name in _NUMBERS}
                return VideoIndex(path=path, **about, **{name: entry[name] for name in _FLAGS})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        except RuntimeError:  # a flipped bit calls the entry encrypted, or packed in a way that is not known
            return None

    def save(self, index: VideoIndex, state: tuple[int, int]) -> None:
        """Keep `index`, made from the file in `state`. Raises ValueError where nothing can be written."""
        arrays = {"about": np.array(json.dumps({name: getattr(index, name) for name in _ABOUT}))}
        arrays |= {name: np.diff(getattr(index, name), prepend=0) for name in _NUMBERS}
        arrays |= {name: getattr(index, name) for name in _FLAGS}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        try:
            write_atomically(self._entry(index.path, state), content.getvalue())
        except OSError as error:
            raise ValueError(f"run_dir={self.folder.parent}: cannot be written to ({error})") from error

    def _entry(self, path: str, state: tuple[int, int]) -> Path:
        identity = [_FORMAT, av.library_versions, os.path.realpath(path), *state]
        return self.folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.npz"


def index_video(path: str, store: IndexStore | None = None) -> VideoIndex:
    """The index of a file. Raises VideoDecodeError for a file that is no whole, readable video."""
    stat = regular_file(path)
    return _index(path, (stat.st_size, stat.st_mtime_ns), store)


@functools.lru_cache(maxsize=_NUM_REMEMBERED)
def _index(path: str, state: tuple[int, int], store: IndexStore | None) -> VideoIndex:
    if store is None:
        return read_index(path)
    index = store.load(path, state)
    if index is None:
        index = read_index(path)
        store.save(index, state)
    return index
