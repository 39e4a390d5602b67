# SPDX-License-Identifier: Apache-2.0
"""Signals that ask to stop only set the flag, and all ranks learn of it at the same step."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_rl.runtime.signals import StopFlag
from tests.world import run_world


def _steps_until_stop(rank: int, number: signal.Signals) -> int:
    """Rank 1 is asked to stop, twice, in its third step. Returns the steps made."""
    dist.init_process_group("gloo")
    stop = StopFlag()
    for step in range(1, 100):
        if rank == 1 and step == 3:
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        if stop.agreed():
            break
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_ranks_leave_after_the_same_step(number: signal.Signals) -> None:
    assert run_world(3, _steps_until_stop, number, timeout=60) == [3, 3, 3]


def test_a_world_of_one() -> None:
    def fn(rank: int) -> list[bool]:
        dist.init_process_group("gloo")
        stop = StopFlag()
        before = stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        return [before, stop.agreed()]

    assert run_world(1, fn, timeout=60) == [[False, True]]
