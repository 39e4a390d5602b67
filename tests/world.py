# SPDX-License-Identifier: Apache-2.0
"""Run a function on every rank of a small world, forked from the test process.

Forking keeps the imports of torch, Megatron-core and vLLM that the test process has already paid for, so a world
starts in well under a second. The test process hosts the rendezvous store (as torchrun's agent does), so no port is
ever guessed. A world never outlives its call: on failure, time-out or interrupt its processes are killed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

LINUX_PR_SET_PDEATHSIG = 1


class WorldFailed(AssertionError):
    """At least one rank failed. `failures` maps each rank that did to its traceback or cause of death."""

    def __init__(self, world_size: int, failures: dict[int, str]):
        super().__init__("\n".join(f"rank {rank} of {world_size}: {why}" for rank, why in failures.items()))
        self.failures = failures


def run_world(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 300.0, grace: float = 1.0
) -> list[Any]:
    """Return [fn(0, *args), fn(1, *args), ...], each computed in its own process.

    `fn` sees torchrun's environment and calls `init_process_group("gloo")` itself; its result must be picklable.
    `grace` is how long the other ranks may still report after the first failure, before they are killed.
    """
    # A store of an earlier world, dead in a cycle, would make a rank join a thread that the fork did not copy.
    gc.collect()
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    readers: list[Connection] = []
    all_forked = context.Event()
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, store.port, all_forked, writer, fn, args),
                name=f"rank{rank}",
            )
            process.start()
            writer.close()  # the rank's own copy is then the last one: its death reads as end-of-file
            processes.append(process)
            readers.append(reader)
        all_forked.set()
        return _collect(processes, readers, time.monotonic() + timeout, timeout, grace)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for reader in readers:
            reader.close()


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    all_forked: Any,
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # what is the parent's is not for a rank to collect
    _die_with_parent()
    # A connection makes the store's thread resolve names; a rank forked meanwhile would inherit glibc's lock for ever.
    all_forked.wait()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    try:
        # By value: the pickler of torch.multiprocessing would send a handle that dies with this process.
        report = pickle.dumps((True, fn(rank, *args)))
    except BaseException:  # a process boundary: whatever happened belongs in the report
        report = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(report)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without clean-up: destructors of inherited objects (store, engines) would wait for threads the fork did not copy.
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_PR_SET_PDEATHSIG, signal.SIGKILL)


def _collect(
    processes: list[Any], readers: list[Connection], deadline: float, timeout: float, grace: float
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = {reader: rank for rank, reader in enumerate(readers)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = pending.pop(reader)
            ok, value = _receive(reader, processes[rank])
            (results if ok else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + grace)
    if pending and not failures:
        failures = {rank: f"no result after {timeout:g} s" for rank in pending.values()}
    if failures:
        raise WorldFailed(len(readers), failures)
    return [results[rank] for rank in range(len(readers))]


def _receive(reader: Connection, process: Any) -> tuple[bool, Any]:
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join()
        code = process.exitcode
        return False, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
