# SPDX-License-Identifier: Apache-2.0
"""sha256 of every file of a Megatron checkpoint: taken when it is written, compared before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path

from megatron_rl.runtime.files import write_atomically

DIGESTS_FILE = "digests.json"
_BLOCK = 1 << 22
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file was when it was written."""

    num_bytes: int
    sha256: str


class HashedStream(RawIOBase):
    """Writes to an unbuffered file from front to back and takes the digest of what it writes.

    `error` is the first OSError of a write: the libraries that write to a stream report others in its place."""

    def __init__(self, file: RawIOBase):
        super().__init__()
        self._file, self._hash, self._num_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]  # all that torch writes
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        while rest:
            try:
                written = self._file.write(rest)
            except OSError as error:
                self.error = self.error or error
                raise
            assert written is not None, "the file blocks"
            self._hash.update(rest[:written])
            self._num_bytes += written
            rest = rest[written:]
        return num_bytes

    def tell(self) -> int:
        return self._num_bytes

    def digest(self) -> FileDigest:
        return FileDigest(self._num_bytes, self._hash.hexdigest())


def digest_of(path: Path) -> FileDigest:
    """Raises OSError."""
    found, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes, found.hexdigest())


def write_digests(folder: Path, known: Mapping[str, FileDigest]) -> None:
    """Write DIGESTS_FILE for all files of `folder`; `known` are those of files that need not be read, by their path in
    the folder. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    missing = [name for name in names if name not in known and name != DIGESTS_FILE]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        read = dict(zip(missing, pool.map(lambda name: digest_of(folder / name), missing), strict=True))
    listed = {name: asdict({**known, **read}[name]) for name in names if name != DIGESTS_FILE}
    write_atomically(folder / DIGESTS_FILE, (json.dumps({"files": listed}, indent=1) + "\n").encode())


def read_digests(folder: Path) -> dict[str, FileDigest] | None:
    """What `write_digests` has written, None for a checkpoint of before there were any. Raises ValueError."""
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return None
    try:
        return {name: FileDigest(**entry) for name, entry in json.loads(path.read_bytes())["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{DIGESTS_FILE}: not readable ({error})") from error


def differences(folder: Path, digests: Mapping[str, FileDigest], part: int = 0, of: int = 1) -> Iterator[str]:
    """ "FILE: reason" for each file that is not what it was. The caller reads share `part` of `of`, even in bytes."""
    shares: list[list[str]] = [[] for _ in range(of)]
    filled = [0] * of
    for name in sorted(digests, key=lambda name: (-digests[name].num_bytes, name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += digests[name].num_bytes
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _difference(folder / name, digests[name]), shares[part])
        yield from (f"{name}: {reason}" for name, reason in zip(shares[part], found, strict=True) if reason)


def _difference(path: Path, was: FileDigest) -> str:
    try:
        size = path.stat().st_size
        if size != was.num_bytes:
            return f"{size} bytes, {was.num_bytes} were written"
        return "" if digest_of(path) == was else "its content has changed since it was written (sha256)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or str(error)
