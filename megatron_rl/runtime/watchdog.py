# SPDX-License-Identifier: Apache-2.0
"""Notices that a rank is gone and stops the others with one line that names it and the phase it was in.

A thread on every rank writes a heartbeat into the rendezvous store and reads those of the neighbouring ranks. Without
it, the survivors of a killed rank wait in a collective for half an hour, or fail in one that tells nothing.
Whoever notices first writes the obituary, and that is the one that all ranks print: no rank blames a mere follower.
The thread also watches the main thread of its own rank, which may be stuck while the heart beats (phase_clock.py).
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_rl.errors import PeerLost
from megatron_rl.runtime.phase_clock import FLOOR_S, PhaseClock, main_thread_is

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with this process, try again
RESUME_ADVICE = "Run the same command again to resume from the newest checkpoint."
REACH = 8  # a rank watches that many ranks on either side: a host that dies whole still has a watched border
SHORT_PATIENCE_S = 6.0
EXPLAIN_S = 10.0
FOR_EVER, LEAVING = datetime.timedelta(days=1), datetime.timedelta(minutes=1)
OBITUARY, NUM_DONE, ALL_DONE, NUM_LEFT, ALL_LEFT = "obituary", "num_done", "all_done", "num_left", "all_left"


def stop_process(message: str) -> None:
    """Say why and end the process, from any thread: the main thread may be blocked in a collective for ever."""
    os.write(2, f"{message}\n".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank tells about itself. `started` tells its process from a later one with the same pid."""

    rank: int
    host: str
    place: str
    pid: int
    started: str
    step: int
    phase: str
    count: int

    @property
    def who(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        return f"phase '{self.phase}' of step {self.step}"


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it has ended, be it as a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else fields[18]


def this_place() -> str:
    """Ranks of the same place (boot and pid namespace) find each other in /proc; empty where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Watchdog:
    """Watches the other ranks from a thread, as a context manager around everything a rank does. Collective to open.

        with watch_world() as watchdog:
            watchdog.set_phase(step, "rollout")
            ...

    While the main thread is inside, a lost peer ends this process with EXIT_CODE. An exception that leaves the block is
    told to the peers as this rank's failure, unless a lost peer explains it: then it becomes a PeerLost.
    A normal exit waits for all ranks. In a world of one there is only the main thread to watch.

    A phase that lasts unusually long is told once, with the main thread's stack; one that lasts longer than `limit_s`
    ends the job (0: never).
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: dist.Store,
        interval_s: float = 1.0,
        patience_s: float = 40.0,
        limit_s: float = 0.0,
        floor_s: float = FLOOR_S,
    ):
        self._rank = rank
        self._world = world
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._limit_s = limit_s
        self._clock = PhaseClock(interval_s, floor_s)
        self._count = 0
        self._publishing = threading.Lock()
        self._message = ""
        self._main_thread_asks = False
        self._found = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        peers = sorted({(rank + offset) % world for offset in range(-REACH, REACH + 1)} - {rank})
        self._alone = not peers
        if peers:
            self._join(peers, store)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._show_stacks_unless_called_again()
        self._thread.start()

    def _join(self, peers: list[int], store: dist.Store) -> None:
        # A wait in one connection blocks every other request in it, so each thread has its own.
        self._main_store = store.clone()  # type: ignore[attr-defined]  # missing in the stub
        self._store = store.clone()  # type: ignore[attr-defined]  # missing in the stub
        self._store.set_timeout(datetime.timedelta(seconds=self._patience_s))
        self._host, self._place = socket.gethostname(), this_place()
        self._started = process_start(os.getpid()) or ""
        self._keys = [OBITUARY, *(f"rank{peer}" for peer in peers)]
        self._main_store.append(OBITUARY, "")
        self._publish(self._store)
        self._main_store.wait(self._keys)
        self._seen = {beat.rank: beat for beat in self._read()[1]}
        self._silent = dict.fromkeys(peers, 0)

    def set_phase(self, step: int, phase: str) -> None:
        """What the main thread does from now on; the peers are told at once (one request to the store)."""
        self._clock.enter(step, phase)
        if self._thread is not None and not self._alone:
            self._publish(self._main_store)

    def explain(self, error: BaseException) -> PeerLost | None:
        """The lost peer behind an error of the main thread, if there is one. Takes up to 10 s when there is none.

        A collective fails within milliseconds of a peer's death, so the watchdog may not know yet. And since something
        is wrong, a shorter silence counts. The main thread is taken to be leaving: the watchdog leaves the end to it.
        """
        if self._thread is None or self._alone or isinstance(error, torch.OutOfMemoryError):
            return None
        self._main_thread_asks = True
        self._patience_s = min(self._patience_s, SHORT_PATIENCE_S)
        return PeerLost(self._message) if self._found.wait(EXPLAIN_S) else None

    def failed(self, error: BaseException) -> None:
        """Tell the peers that this rank ends with `error`, and stop watching."""
        if self._thread is None:
            return
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        obituary = f"rank {self._rank} failed in {self._clock.where}: {what}"
        self._end_thread()
        if self._alone:
            return
        try:
            self._main_store.compare_set(OBITUARY, "", obituary)
        except dist.DistError:
            return  # the store is gone, and with it the peers; the caller raises `error`

    def close(self) -> None:
        """Wait until every rank is here, watching on; then stop watching. Collective."""
        if self._thread is None:
            return
        if self._alone:
            self._end_thread()
            return
        self.set_phase(self._clock.now[0], "close")
        try:
            self._arrive(NUM_DONE, ALL_DONE, self._world)
            self._main_store.wait([ALL_DONE], FOR_EVER)  # if a rank dies meanwhile, the thread ends this process
            if self._rank == 0:
                self._main_store.wait([ALL_LEFT], LEAVING)  # the store may live in this process
        except dist.DistError as error:
            self._leave_with(error)
            raise
        self._end_thread()
        if self._rank != 0:
            self._arrive(NUM_LEFT, ALL_LEFT, self._world - 1)

    def _arrive(self, counter: str, complete: str, expected: int) -> None:
        if self._main_store.add(counter, 1) == expected:
            self._main_store.set(complete, "")

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._leave_with(error)

    def _leave_with(self, error: BaseException) -> None:
        lost = self.explain(error) if isinstance(error, RuntimeError | ConnectionError) else None
        if lost is None:
            self.failed(error)
            return
        self._end_thread()
        raise lost from error

    def _end_thread(self) -> None:
        """Not left to the interpreter's end, which aborts a thread that is then inside the store."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._show_stacks_unless_called_again()
            self._clock.look()
            self._tell_if_overdue()
            try:
                message = self._over_limit() if self._alone else self._beat()
            except dist.DistError as error:
                message = self._store_lost(error)
            if not message or self._stop.is_set():
                continue
            self._message = message
            self._found.set()
            if not self._main_thread_asks:
                stop_process(f"rank {self._rank}: {message}")
            return

    def _show_stacks_unless_called_again(self) -> None:
        """For a main thread that never lets go of the interpreter's lock: then no other thread of Python can speak."""
        faulthandler.dump_traceback_later(0.75 * self._patience_s, file=2)

    def _tell_if_overdue(self) -> None:
        how_long = self._clock.overdue()
        if how_long is None:
            return
        found = main_thread_is()
        doing = (
            f"it waits for other ranks in {found.collective}"
            if found.collective
            else f"its main thread is here:\n{found.stack}"
        )
        os.write(2, f"rank {self._rank} has been {how_long}; {doing}\n".encode())

    def _over_limit(self) -> str | None:
        """Ranks that wait for a stuck one give it the time to accuse itself."""
        over = self._clock.seconds - self._limit_s
        if not self._limit_s or over <= 0 or (over <= self._patience_s and main_thread_is().collective):
            return None
        where = main_thread_is()
        os.write(2, f"rank {self._rank}: the main thread is here:\n{where.stack}".encode())
        return (
            f"rank {self._rank} has been in {self._clock.where} for {self._clock.seconds:.0f} s, longer than "
            f"max_phase_minutes={self._limit_s / 60:g}; stopping. {RESUME_ADVICE}"
        )

    def _beat(self) -> str | None:
        self._publish(self._store)
        return self._look()

    def _publish(self, store: dist.Store) -> None:
        with self._publishing:
            self._count += 1
            step, phase = self._clock.now
            beat = Heartbeat(self._rank, self._host, self._place, os.getpid(), self._started, step, phase, self._count)
            store.set(f"rank{self._rank}", json.dumps(asdict(beat)))

    def _read(self) -> tuple[str, list[Heartbeat]]:
        obituary, *beats = self._store.multi_get(self._keys)
        return obituary.decode(), [Heartbeat(**json.loads(beat)) for beat in beats]

    def _look(self) -> str | None:
        """The obituary that is already there, else the one that this rank has reason to write."""
        obituary, beats = self._read()
        if obituary:
            # A rank that failed leaves before those it takes along, so that torchrun reports it as the root cause.
            self._stop.wait(2 * self._interval_s)
            return obituary
        for beat in beats:
            # Counted in looks, not seconds: after a pause of this very process, nobody has been silent yet.
            self._silent[beat.rank] = 0 if beat.count != self._seen[beat.rank].count else self._silent[beat.rank] + 1
            self._seen[beat.rank] = beat
        reason = self._dead_peer() or self._silent_peer() or self._over_limit()
        if reason is None or self._store.check([ALL_DONE]):  # then ranks may end, and some have before this one
            return None
        return self._store.compare_set(OBITUARY, "", reason).decode()

    def _dead_peer(self) -> str | None:
        for beat in self._seen.values():
            if beat.place and beat.place == self._place and process_start(beat.pid) != beat.started:
                return f"{beat.who} is gone: last seen in {beat.where}; stopping. {RESUME_ADVICE}"
        return None

    def _silent_peer(self) -> str | None:
        for beat in self._seen.values():
            seconds = self._silent[beat.rank] * self._interval_s
            if seconds >= self._patience_s:
                return (
                    f"{beat.who} has not answered for {seconds:.0f} s: last seen in {beat.where}; stopping. "
                    f"{RESUME_ADVICE}"
                )
        return None

    def _store_lost(self, error: dist.DistError) -> str:
        """The store's host may be a rank of this host; else all that is known is that the store is gone."""
        return self._dead_peer() or (
            f"the rendezvous store is gone ({str(error).splitlines()[0]}): rank 0 or the first node's launcher or host "
            f"has died; stopping in {self._clock.where}. {RESUME_ADVICE}"
        )


def watch_world(limit_s: float = 0.0) -> Watchdog:
    """The watchdog of the default process group; a restart by torchrun does not see its predecessor's obituary."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"watchdog{attempt}", _get_default_store())
    return Watchdog(dist.get_rank(), dist.get_world_size(), store, limit_s=limit_s)
