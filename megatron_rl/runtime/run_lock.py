# SPDX-License-Identifier: Apache-2.0
"""One job at a time in a run folder: two would mix their metrics and checkpoints, and nobody would see it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "run.lock"


@contextmanager
def held_run_folder(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`, which is made, for this process while the block runs. Raises ValueError that names the owner.

    The lock is the operating system's and ends with the process, however it ends; forked children do not inherit it.
    The file tells who holds it (host, pid, start) and what a killed job has left in it is overwritten. It is written in
    place, since the lock is on the file and not on its name, and removed at the end of the block.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, owner = run_dir / LOCK_FILE, os.getpid()
    file = _locked(path)
    try:
        _write_owner(file)
        yield
    finally:
        if os.getpid() == owner:  # and not a forked child on its way out
            path.unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path) -> int:
    """A descriptor of `path` that holds its lock. Closing any other descriptor of it would end the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _is_at(path, file)  # the last owner may have removed it since it was opened
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"run_dir={path.parent}: {_owner(file)} works in it; wait for its end, stop it, or use another run_dir"
            ) from None
        except OSError as error:
            raise ValueError(
                f"run_dir={path.parent}: cannot be locked against a second job ({error}); use a file system with locks"
            ) from error
        finally:
            if not held:
                os.close(file)
        if held:
            return file


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _write_owner(file: int) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode(), 0)


def _owner(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, started {owner['start']},"
    except ValueError:  # it has the lock and is about to write its name
        return "another job"
