# SPDX-License-Identifier: Apache-2.0
"""A rank that dies, fails or stalls must stop the others soon, with its name and phase; a rank that ends must not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_rl.errors import PeerLost
from megatron_rl.runtime.watchdog import EXIT_CODE, RESUME_ADVICE, Watchdog, process_start, watch_world
from tests.world import WorldFailed, run_world

REPO = Path(__file__).parents[2]
GONE_FROM_ROLLOUT = "is gone: last seen in phase 'rollout' of step 7"
STOPPED = f"exited with status {EXIT_CODE}"


def _sleep_for_ever() -> None:
    time.sleep(600)


def _reduce_for_ever() -> None:
    while True:
        dist.all_reduce(torch.ones(1000))


def _watched(rank: int, folder: Path, body: Callable[[int], None]) -> None:
    """Run `body` under the watchdog in phase 'rollout' of step 7, with what the rank says in a file."""
    os.dup2(os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo")
    with watch_world() as watchdog:
        watchdog.set_phase(7, "rollout")
        time.sleep(1.5)  # long enough to be in a heartbeat
        body(rank)


def _said(folder: Path, rank: int) -> list[str]:
    """The lines of a rank's stderr that are about a rank; torch reports broken connections there as well."""
    return re.findall(r"^rank .*$", (folder / f"rank{rank}").read_text(), re.MULTILINE)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_named_with_its_phase(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        _kill_self() if rank == 1 else _sleep_for_ever()

    start = time.monotonic()
    with pytest.raises(WorldFailed) as failure:
        run_world(3, _watched, tmp_path, body, grace=30)
    assert time.monotonic() - start < 15
    assert failure.value.failures == {0: STOPPED, 1: "killed by SIGKILL", 2: STOPPED}
    for rank in (0, 2):
        [line] = _said(tmp_path, rank)
        about, advice = line.split("; ", 1)
        assert re.fullmatch(rf"rank {rank}: rank 1 \(pid \d+ on \S+\) {GONE_FROM_ROLLOUT}", about)
        assert advice == f"stopping. {RESUME_ADVICE}"


def test_a_collective_that_breaks_is_explained(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        if rank == 1:
            _kill_self()
        _reduce_for_ever()

    with pytest.raises(WorldFailed) as failure:
        run_world(3, _watched, tmp_path, body, grace=30)
    assert failure.value.failures.pop(1) == "killed by SIGKILL"
    assert sorted(failure.value.failures) == [0, 2]
    for why in failure.value.failures.values():
        assert PeerLost.__name__ in why and "The above exception was the direct cause" in why
        assert re.search(rf"rank 1 \(pid \d+ on \S+\) {GONE_FROM_ROLLOUT}", why)


def test_a_stopped_process_is_silent(tmp_path: Path) -> None:
    """SIGSTOP stands for a host that hangs: the process is there, but its heart does not beat."""

    def fn(rank: int) -> None:
        os.dup2(os.open(tmp_path / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
        dist.init_process_group("gloo")
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
        with Watchdog(rank, 2, store, interval_s=0.2, patience_s=2.0) as watchdog:
            watchdog.set_phase(3, "encode")
            time.sleep(0.5)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            _sleep_for_ever()

    with pytest.raises(WorldFailed) as failure:
        run_world(2, fn, grace=0.5)
    assert failure.value.failures == {0: STOPPED}
    [line] = _said(tmp_path, 0)
    assert re.match(r"rank 0: rank 1 \(pid \d+ on \S+\) has not answered for 2 s: last seen in phase 'encode' ", line)


def test_a_pause_of_all_ranks_is_no_silence(tmp_path: Path) -> None:
    """Ranks that were all held up (a stalled file system, a suspended machine) do not accuse each other afterwards."""

    def fn(rank: int) -> float:
        os.dup2(os.open(tmp_path / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
        dist.init_process_group("gloo")
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
        with Watchdog(rank, 2, store, interval_s=0.2, patience_s=2.0):
            start, pid = time.monotonic(), os.getpid()
            pause = f"kill -STOP {pid}; sleep {4 + 0.6 * rank}; kill -CONT {pid}"
            subprocess.run(["sh", "-c", pause], check=True)
            time.sleep(1.0)
        return time.monotonic() - start

    assert min(run_world(2, fn)) > 4
    assert [_said(tmp_path, rank) for rank in range(2)] == [[], []]


def test_the_error_of_one_rank_reaches_the_others(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        if rank == 2:
            raise ValueError("data.train=x.jsonl: line 4 is not JSON; mend it")
        _sleep_for_ever()

    with pytest.raises(WorldFailed) as failure:
        run_world(3, _watched, tmp_path, body, grace=30)
    assert failure.value.failures.pop(2).endswith("ValueError: data.train=x.jsonl: line 4 is not JSON; mend it\n")
    assert failure.value.failures == {0: STOPPED, 1: STOPPED}
    for rank in (0, 1):
        assert _said(tmp_path, rank) == [
            f"rank {rank}: rank 2 failed in phase 'rollout' of step 7: "
            "ValueError: data.train=x.jsonl: line 4 is not JSON; mend it"
        ]


def test_an_error_of_ones_own_is_not_blamed_on_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.runtime.watchdog.EXPLAIN_S", 1.0)

    def body(rank: int) -> None:
        if rank == 1:
            raise RuntimeError("shapes differ")
        _sleep_for_ever()

    with pytest.raises(WorldFailed) as failure:
        run_world(2, _watched, tmp_path, body, grace=30)
    why = failure.value.failures.pop(1)
    assert why.endswith("RuntimeError: shapes differ\n") and PeerLost.__name__ not in why
    assert failure.value.failures == {0: STOPPED}
    assert _said(tmp_path, 0) == ["rank 0: rank 1 failed in phase 'rollout' of step 7: RuntimeError: shapes differ"]


def test_ranks_that_end_apart_are_not_missed(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        time.sleep(2.5 * rank)

    assert run_world(3, _watched, tmp_path, body) == [None] * 3
    assert [_said(tmp_path, rank) for rank in range(3)] == [[]] * 3


def _rank_0_hosts(rank: int, folder: Path, port: int, dies: bool) -> None:
    os.dup2(os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
    with Watchdog(rank, 3, store, interval_s=0.2) as watchdog:
        watchdog.set_phase(7, "rollout")
        time.sleep(0.5)
        if dies:
            _kill_self() if rank == 0 else _sleep_for_ever()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_may_end_at_once(tmp_path: Path) -> None:
    """A process that ends because all are done must not pass for dead, however often the others look."""

    def fn(rank: int) -> None:
        os.dup2(os.open(tmp_path / f"rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
        with Watchdog(rank, 3, store, interval_s=0.0005):
            pass

    for _ in range(8):
        assert run_world(3, fn) == [None] * 3
    assert [_said(tmp_path, rank) for rank in range(3)] == [[]] * 3


def test_rank_0_may_host_the_store_and_end(tmp_path: Path, free_port: int) -> None:
    """As without torchrun: the store ends with rank 0, which the others must not take for its death."""
    assert run_world(3, _rank_0_hosts, tmp_path, free_port, False) == [None] * 3
    assert [_said(tmp_path, rank) for rank in range(3)] == [[]] * 3


def test_rank_0_may_host_the_store_and_die(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(WorldFailed) as failure:
        run_world(3, _rank_0_hosts, tmp_path, free_port, True, grace=30)
    assert failure.value.failures == {0: "killed by SIGKILL", 1: STOPPED, 2: STOPPED}
    for rank in (1, 2):
        [line] = _said(tmp_path, rank)
        assert re.match(rf"rank {rank}: rank 0 \(pid \d+ on \S+\) {GONE_FROM_ROLLOUT}; ", line)


def test_a_lost_store_is_told(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = (
        "import sys, time, torch.distributed as dist; from megatron_rl.runtime.watchdog import Watchdog\n"
        "store = dist.TCPStore('127.0.0.1', int(sys.argv[2]))\n"
        "with Watchdog(int(sys.argv[1]), 2, store, interval_s=0.2) as watchdog:\n"
        "    watchdog.set_phase(4, 'score'); store.add('ready', 1); time.sleep(600)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(store.port)], cwd=REPO, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    store.wait(["rank0", "rank1"], timedelta(seconds=120))
    while store.add("ready", 0) < 2:
        time.sleep(0.1)
    del store
    for process in ranks:
        _, said = process.communicate(timeout=60)
        assert process.returncode == EXIT_CODE
        assert re.search(rb"^rank \d: the rendezvous store is gone .* of step 4\. Run the same", said, re.MULTILINE)


def test_a_world_of_one_needs_no_store() -> None:
    with Watchdog(0, 1, dist.HashStore()) as watchdog:
        watchdog.set_phase(1, "train")
        assert watchdog.explain(RuntimeError("own")) is None
    with pytest.raises(RuntimeError, match="own"), Watchdog(0, 1, dist.HashStore()):
        raise RuntimeError("own")


def test_zombies_and_reused_pids_do_not_pass_for_the_living() -> None:
    process = subprocess.Popen(["sleep", "600"])
    ours, theirs = process_start(os.getpid()), process_start(process.pid)
    assert ours is not None and theirs is not None and float(theirs) >= float(ours)
    ticks = os.sysconf("SC_CLK_TCK")
    assert abs(psutil.boot_time() + int(theirs) / ticks - psutil.Process(process.pid).create_time()) < 1.0
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert process_start(process.pid) is None
    process.wait()
    assert process_start(process.pid) is None


TORCHRUN_JOB = """
import os, sys, time, torch, torch.distributed as dist
from megatron_rl.errors import PeerLost
from megatron_rl.runtime.signals import StopFlag
from megatron_rl.runtime.watchdog import stop_process, watch_world

folder, action = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
stop = StopFlag()
try:
    with watch_world() as watchdog:
        for step in range(600):
            watchdog.set_phase(step, "train")
            if step == 2:
                open(f"{folder}/pid{rank}.tmp", "w").write(str(os.getpid()))
                os.rename(f"{folder}/pid{rank}.tmp", f"{folder}/pid{rank}")
            if action == "raise" and rank == 1 and step == 3:
                raise KeyError("deliberate")
            if action == "sleep" and step == 3:
                time.sleep(600)
            time.sleep(0.5)
            dist.all_reduce(torch.ones(1))
            if stop.agreed():
                open(f"{folder}/saved{rank}", "w").write(str(step))
                break
except PeerLost as lost:
    stop_process(str(lost))
dist.destroy_process_group()
"""


def _torchrun(folder: Path, action: str) -> subprocess.Popen[str]:
    script = folder / "job.py"
    script.write_text(TORCHRUN_JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    job = subprocess.Popen([*command, str(folder), action], stderr=subprocess.PIPE, text=True, env=environ)
    if action != "raise":
        while not all((folder / f"pid{rank}").exists() for rank in range(2)):
            assert job.poll() is None, job.stderr
            time.sleep(0.1)
        time.sleep(1.5)
    return job


@pytest.mark.parametrize("action", ["reduce", "sleep"])
def test_torchrun_with_a_killed_rank(tmp_path: Path, action: str) -> None:
    job = _torchrun(tmp_path, action)
    pid = int((tmp_path / "pid1").read_text())
    os.kill(pid, signal.SIGKILL)
    _, said = job.communicate(timeout=20)
    assert job.returncode == 1
    assert re.search(
        rf"^(rank 0: )?rank 1 \(pid {pid} on \S+\) is gone: last seen in phase 'train' of step", said, re.M
    )


def test_torchrun_with_a_failing_rank(tmp_path: Path) -> None:
    job = _torchrun(tmp_path, "raise")
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "rank 1 failed in phase 'train' of step 3: KeyError: 'deliberate'" in said
    root_cause = said[said.index("Root Cause") :]
    assert re.search(r"rank\s+: 1 ", root_cause), root_cause


def test_torchrun_that_is_asked_to_stop(tmp_path: Path) -> None:
    job = _torchrun(tmp_path, "reduce")
    job.terminate()
    _, said = job.communicate(timeout=20)
    assert not re.search(r"is gone|failed in|has not answered", said)
    assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
