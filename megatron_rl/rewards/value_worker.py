# SPDX-License-Identifier: Apache-2.0
"""Compares values for value_process.py: `python -P value_worker.py CPU_SECONDS`. A line `["answer", "reference"]` comes
in, a line "right", "wrong" or "given up" goes out, until the input ends; the first line out is "ready".

Each comparison runs in a fork of its own, which the kernel ends after its processor time, wherever it is (math-verify's
limit is an exception out of SIGALRM, which needs the main thread and waits for C code), and which may take no more than
MEMORY_BYTES.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 << 30


def main(cpu_seconds: float) -> None:
    """Serve until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the process that asks
    logging.disable(logging.CRITICAL)  # of failed parsing, and that math-verify's own limit is off
    _equal(r"\frac{1}{2}", "0.5")  # compiles patterns and fills tables that every fork then has
    replies = os.dup(1)
    os.dup2(2, 1)
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        answer, reference = json.loads(line)
        child = os.fork()
        if child == 0:
            _compare(answer, reference, cpu_seconds)
        _, status = os.waitpid(child, 0)
        words = {0: b"right\n", 1 << 8: b"wrong\n"}
        os.write(replies, words.get(status, b"given up\n"))


def _compare(answer: str, reference: str, cpu_seconds: float) -> None:
    """Ends this process: status 0 right, 1 wrong, a signal at the limit."""
    status = 2
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        status = 0 if _equal(answer, reference) else 1
    except (MemoryError, RecursionError):
        pass
    finally:
        os._exit(status)


def _equal(answer: str, reference: str) -> bool:
    gold, target = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    return bool(verify(gold, target, timeout_seconds=None))


if __name__ == "__main__":
    main(float(sys.argv[1]))
