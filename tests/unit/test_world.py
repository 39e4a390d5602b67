# SPDX-License-Identifier: Apache-2.0
"""The harness under every distributed test: it must report, and it must never hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.world import WorldFailed, run_world


def _sum_of_ranks(rank: int, factor: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    total = torch.tensor([float(rank * factor)])
    dist.all_reduce(total)
    return total


def test_all_reduce_and_tensor_results() -> None:
    results = run_world(4, _sum_of_ranks, 10)
    assert [result.item() for result in results] == [60.0] * 4


def test_results_come_in_rank_order_and_may_be_large() -> None:
    def fn(rank: int) -> bytes:
        time.sleep(0.05 * (2 - rank))
        return bytes([rank]) * 1_000_000

    assert [result[:1] + result[-1:] for result in run_world(3, fn)] == [b"\0\0", b"\1\1", b"\2\2"]


def test_ranks_see_torchruns_environment() -> None:
    def fn(rank: int) -> tuple[str, ...]:
        return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))

    assert run_world(2, fn) == [("0", "0", "2", "1"), ("1", "1", "2", "1")]
    assert "RANK" not in os.environ


def test_failure_of_one_rank_ends_the_waiting_ones() -> None:
    def fn(rank: int) -> None:
        if rank == 1:
            raise KeyError("deliberate")
        time.sleep(600)

    start = time.monotonic()
    with pytest.raises(WorldFailed, match=r"rank 1 of 2: [\s\S]*in fn\n[\s\S]*KeyError: 'deliberate'") as failure:
        run_world(2, fn, grace=0.1)
    assert list(failure.value.failures) == [1]
    assert time.monotonic() - start < 30


def test_killed_rank_is_named_with_its_signal() -> None:
    def fn(rank: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    with pytest.raises(WorldFailed, match="rank 0 of 2: killed by SIGKILL"):
        run_world(2, fn, grace=0.1)


def test_grace_lets_the_others_report_what_they_saw() -> None:
    def fn(rank: int) -> None:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 0:
            os._exit(3)
        dist.barrier()

    with pytest.raises(WorldFailed) as failure:
        run_world(2, fn, grace=30.0)
    assert failure.value.failures[0] == "exited with status 3"
    assert "barrier" in failure.value.failures[1]


def test_timeout_kills_and_names_who_is_missing(tmp_path) -> None:
    def fn(rank: int) -> int:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        if rank == 1:
            time.sleep(600)
        return rank

    with pytest.raises(WorldFailed, match="rank 1 of 2: no result after 1.5 s"):
        run_world(2, fn, timeout=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)
