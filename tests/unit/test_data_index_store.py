# SPDX-License-Identifier: Apache-2.0
"""Indexes on disk: equal to those of a pass over the file, and never used when damaged or of another file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from data.video import index_store
from data.video.index import VideoIndex
from data.video.index_store import IndexStore, index_video
from data.video.pixels import CpuVideoDecoder
from tests.video_files import Kind, write_kind, write_video


def state(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def assert_equal(ours: VideoIndex | None, expected: VideoIndex) -> None:
    assert ours is not None
    for field in dataclasses.fields(VideoIndex):
        mine, theirs = getattr(ours, field.name), getattr(expected, field.name)
        assert type(mine) is type(theirs), field.name
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The files that are read through, as a process does that remembers nothing."""
    seen: list[str] = []
    read = index_store.read_index
    monkeypatch.setattr(index_store, "read_index", lambda path: seen.append(path) or read(path))
    index_store._index.cache_clear()
    return seen


@pytest.mark.parametrize(
    "name", ["h264_open_gop.ts", "h264_vfr.mkv", "h264_raw.h264", "vp9_hidden.webm", "vp9_odd.mp4"]
)
def test_an_index_comes_back_as_it_was(tmp_path, name):
    path = write_kind(tmp_path, name)
    store, index = IndexStore(tmp_path / "index"), index_video(path)
    assert store.load(path, state(path)) is None
    store.save(index, state(path))
    assert_equal(store.load(path, state(path)), index)


def test_a_file_is_read_through_once(tmp_path, passes):
    path = write_video(tmp_path / "a.mp4", Kind("libx264"), 20)
    store = IndexStore(tmp_path / "index")
    frames = CpuVideoDecoder(1, store).decode(path, range(20), (56, 56))
    for again in (IndexStore(tmp_path / "index"), store):
        index_store._index.cache_clear()
        assert np.array_equal(CpuVideoDecoder(1, again).decode(path, range(20), (56, 56)), frames)
    assert passes == [path]


def test_a_changed_file_is_read_again(tmp_path, passes):
    path, store = str(tmp_path / "a.mp4"), IndexStore(tmp_path / "index")
    for num_frames in (10, 20):
        write_video(path, Kind("libx264"), num_frames)
        os.utime(path, ns=(num_frames, num_frames))
        assert index_video(path, store).num_frames == num_frames
    assert passes == [path, path]


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "text", "foreign"])
def test_a_damaged_entry_is_made_again(tmp_path, passes, harm):
    path, store = write_video(tmp_path / "a.mp4", Kind("libx264"), 20), IndexStore(tmp_path / "index")
    index = index_video(path, store)
    [entry] = store.folder.iterdir()
    content = bytearray(entry.read_bytes())
    if harm == "foreign":
        with entry.open("wb") as file:
            np.savez_compressed(file, about=np.array("[]"), pts=np.arange(3))
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
        entry.write_bytes(content)
    else:
        entry.write_bytes({"cut": content[:-40], "empty": b"", "text": b"hello"}[harm])
    assert store.load(path, state(path)) is None
    index_store._index.cache_clear()
    assert_equal(index_video(path, store), index)
    assert_equal(store.load(path, state(path)), index)
    assert passes == [path, path] and list(store.folder.iterdir()) == [entry]


def test_no_flipped_bit_stops_a_run_or_goes_into_an_index(tmp_path):
    path, store = write_video(tmp_path / "a.mp4", Kind("libx264"), 20), IndexStore(tmp_path / "index")
    index = index_video(path, store)
    [entry] = store.folder.iterdir()
    content, num_refused = entry.read_bytes(), 0
    for number in range(len(content)):
        flipped = bytearray(content)
        flipped[number] ^= 1 << number % 8
        entry.write_bytes(flipped)
        loaded = store.load(path, state(path))
        num_refused += loaded is None
        if loaded is not None:  # a bit that says nothing, such as of the time at which it was written
            assert_equal(loaded, index)
    assert num_refused > len(content) / 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    path = write_video(tmp_path / "a.mp4", Kind("libx264"), 4)
    with pytest.raises(ValueError, match=r"run_dir=.*file: cannot be written to"):
        index_video(path, IndexStore(Path(tmp_path / "file" / "index")))
