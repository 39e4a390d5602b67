# SPDX-License-Identifier: Apache-2.0
"""The process that compares values (value_worker.py), seen from the process that asks."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

CPU_SECONDS = 2.0  # of one comparison
WALL_SECONDS = 30.0  # of one comparison, until the process counts as stuck: the machine may be busy
START_SECONDS = 120.0  # to import sympy

_SCRIPT = Path(__file__).with_name("value_worker.py")


class ValueProcess:
    """Starts with the first question and serves one at a time, from any thread. It ends with `close`, and by itself
    when this process is gone. A fork of this process starts its own."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS):
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None or self._owner != os.getpid() else self._process.pid

    def compare(self, answer: str, reference: str) -> bool | None:
        """Whether math-verify calls them equal; None when it takes more than its processor time.

        A process that was killed or does not reply is started anew, once; RuntimeError when that one fails too.
        """
        question = json.dumps([answer, reference]).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                reply = self._ask(question)
                if reply is not None:
                    return {b"right\n": True, b"wrong\n": False}.get(reply)
        raise RuntimeError(
            f"{_SCRIPT.name}, which compares values, ended or did not reply, twice; see its messages above"
        )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, question: bytes) -> bytes | None:
        """The reply; None when the process is gone. Whatever happens, no reply is left for the next question."""
        process, reply = self._started(), None
        try:
            os.write(_descriptor(process.stdin), question)
            reply = _line(_descriptor(process.stdout), self._wall_seconds)
        except BrokenPipeError:
            pass
        finally:
            if reply is None:
                self._end()
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, ready for a question."""
        if self._process is None or self._owner != os.getpid():
            command = [sys.executable, "-P", "-W", "ignore", str(_SCRIPT), str(self._cpu_seconds)]
            # -P: its folder holds a math.py. A group of its own: Ctrl-C and the launcher's signals are for the ranks.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            self._owner = os.getpid()
            ready = False
            try:
                ready = _line(_descriptor(self._process.stdout), START_SECONDS) is not None
            finally:
                if not ready:
                    self._end()
            if not ready:
                raise RuntimeError(f"{_SCRIPT.name}, which compares values, did not start; see its messages above")
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def _line(descriptor: int, seconds: float) -> bytes | None:
    """The next line; None at the end of the file or after `seconds`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            return None
        data = os.read(descriptor, 64)
        if not data:
            return None
        line += data
    return line
