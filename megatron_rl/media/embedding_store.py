# SPDX-License-Identifier: Apache-2.0
"""Media embeddings on disk, shared by steps and by runs, also by runs at the same time.

    <folder>/3f/3fa4....safetensors     8 units of an item: embeds [n, width], seal [32]
    <folder>/files/91c0....json         sha256 of a media file, as long as it is the same file

An entry is named by everything that decides what is in it: the content of the file, the frames, their size, and the
encoder (weights, dtype, preprocessing). So an entry of other weights, or of a changed file, is never looked for. One
that is damaged, or that lies under a name not its own, is not used and is written anew. Files appear complete or
not at all; the entries used longest ago go first when the folder outgrows its bound.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from megatron_rl.runtime.files import write_atomically, written_atomically
from megatron_rl.runtime.parallel import local_rank
from megatron_rl.types import MediaItem

FORMAT = 2
UNITS_PER_ENTRY = 8
SCAN_FRACTION = 0.01  # of the bound: how much a process writes before it looks at the folder again
ABANDONED_SECONDS = 3600.0  # a partial file that old belongs to nobody
SETTLED_NS = 2_000_000_000  # a file changed this recently may change again without its times telling

Identity = tuple[int, int, int, int]  # of a file: device number, size, times of last modification and change


@dataclass(frozen=True, slots=True)
class _Content:
    sha256: str
    identity: Identity


class DiskStore:
    """Entries in `folder`, at most `max_bytes` of them (protocol EmbeddingStore).

    `encoder_id` is the encoder's fingerprint. The bound may be exceeded by what the running jobs write between two
    looks at the folder, 1 % of it each.
    """

    units_per_entry = UNITS_PER_ENTRY

    def __init__(self, folder: str | Path, max_bytes: int, encoder_id: str, dtype: torch.dtype, width: int):
        self.folder, self._max_bytes, self._encoder_id = Path(folder), max_bytes, encoder_id
        self._dtype, self._width = dtype, width
        self._content: dict[str, _Content] = {}
        self._unseen_bytes = 0.0
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def identify(self, media: Sequence[MediaItem]) -> None:
        """Find out what is in the files: each is read by one rank, unless it is known and unchanged. Collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = {m.key: self._content_of(m.path, self._content.get(m.key)) for m in media[rank::world]}
        everyone: list[dict[str, _Content | None]] = [{} for _ in range(world)]
        dist.all_gather_object(everyone, mine)
        found = {key: content for part in everyone for key, content in part.items()}
        self._content = {key: content for key, content in (self._content | found).items() if content is not None}

    def holds(self, item: MediaItem, start: int, stop: int) -> bool:
        """Whether there is an entry for all of the units [start, stop), whole or damaged."""
        content = self._content.get(item.key)
        return content is not None and all(
            self._path(self._key(item, content, *entry)).exists() for entry in _entries(start, stop)
        )

    def read(self, item: MediaItem, start: int, stop: int) -> tuple[Tensor | None, int]:
        """Embeddings [n, width] of the units [start, stop), and how many entries were there but damaged."""
        parts, num_damaged = [], 0
        for first, last in _entries(start, stop):
            found, is_damaged = self._read_entry(item, first, last)
            num_damaged += is_damaged
            if found is not None:
                parts.append(found)
        complete = len(parts) == len(list(_entries(start, stop)))
        return torch.cat(parts) if complete else None, num_damaged

    def write(self, item: MediaItem, start: int, stop: int, embeds: Tensor) -> None:
        """Keep the embeddings [n, width] of units [start, stop); of a file that has changed since it was identified,
        nothing is kept."""
        content = self._content.get(item.key)
        if content is None or _identity(item.path) != content.identity:
            return
        offset = item.tokens_of(start, stop)[0]
        for first, last in _entries(start, stop):
            token, end = item.tokens_of(first, last)
            part = embeds[token - offset : end - offset]
            self._write_entry(self._key(item, content, first, last), part.cpu().clone())

    def trim(self) -> None:
        """Remove what was used longest ago until the folder is within its bound. Collective."""
        total = torch.tensor([self._unseen_bytes], dtype=torch.float64)
        dist.all_reduce(total)
        if float(total) > SCAN_FRACTION * self._max_bytes:
            self._unseen_bytes = 0.0
            if local_rank() == 0:  # of every machine: the folder may be its own
                self._remove_oldest()

    # --------------------------------------------------------------------------------------------------------- entries

    def _key(self, item: MediaItem, content: _Content, first: int, last: int) -> str:
        start, stop = item.frames_of(first, last)
        # The spectrogram of a sound depends on all that is taken of it.
        frames = ["audio", item.span, start, stop] if item.kind == "audio" else item.frame_indices[start:stop]
        identity = [FORMAT, self._encoder_id, content.sha256, frames, item.size_hw]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read_entry(self, item: MediaItem, first: int, last: int) -> tuple[Tensor | None, bool]:
        """(embeddings [n, width], False), (None, False) where there is no entry, (None, True) where it is not what it
        should be."""
        content = self._content.get(item.key)
        if content is None:
            return None, False
        key = self._key(item, content, first, last)
        try:
            # Opened once: safe_open would open the file again for the tensor, and another run may remove it in between.
            stored = load(self._path(key).read_bytes())
        except FileNotFoundError:
            return None, False
        except SafetensorError:
            return None, True
        with suppress(FileNotFoundError):  # removed meanwhile
            os.utime(self._path(key))
        token, end = item.tokens_of(first, last)
        shape = (end - token, self._width)
        embeds = stored.get("embeds")
        is_whole = embeds is not None and tuple(embeds.shape) == shape and embeds.dtype == self._dtype
        if embeds is None or not is_whole or not torch.equal(stored.get("seal", torch.empty(0)), _seal(key, embeds)):
            return None, True
        return embeds, False

    def _write_entry(self, key: str, embeds: Tensor) -> None:
        path = self._path(key)
        try:
            with written_atomically(path) as scratch:
                save_file({"embeds": embeds, "seal": _seal(key, embeds)}, scratch)
                scratch.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets only the owner read
                self._unseen_bytes += scratch.stat().st_size
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _remove_oldest(self) -> None:
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another run was faster
            if path.suffix == ".partial" and time.time() - stat.st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size

    # ----------------------------------------------------------------------------------------------------- media files

    def _content_of(self, path: str, before: _Content | None) -> _Content | None:
        """None where the file cannot be read: the decoder will say why."""
        identity = _identity(path)
        if identity is None:
            return None
        if before is not None and before.identity == identity:
            return before
        memo = self.folder / "files" / f"{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()}.json"
        known = _read_memo(memo)
        if known is not None and known.identity == identity:
            return known
        try:
            with open(path, "rb") as file:
                content = _Content(hashlib.file_digest(file, "sha256").hexdigest(), identity)
        except OSError:
            return None
        if _identity(path) == identity and time.time_ns() - max(identity[2:]) > SETTLED_NS:
            self._write_memo(memo, content)
        return content

    def _write_memo(self, memo: Path, content: _Content) -> None:
        try:
            write_atomically(memo, json.dumps([content.sha256, content.identity]).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> ValueError:
        return ValueError(f"data.cache_dir={self.folder}: cannot be written ({error}); mend it, or unset it")


def _entries(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The units of each entry; `start` begins one."""
    assert start % UNITS_PER_ENTRY == 0
    for first in range(start, stop, UNITS_PER_ENTRY):
        yield first, min(first + UNITS_PER_ENTRY, stop)


def _seal(key: str, embeds: Tensor) -> Tensor:
    """sha256 over the name of an entry and what is in it, uint8 [32]."""
    digest = hashlib.sha256(key.encode())
    digest.update(embeds.contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _identity(path: str) -> Identity | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_memo(memo: Path) -> _Content | None:
    """None for one that is absent or damaged."""
    try:
        sha256, identity = json.loads(memo.read_text(encoding="utf-8"))
        return _Content(str(sha256), tuple(identity))
    except (FileNotFoundError, ValueError, TypeError):
        return None
