# SPDX-License-Identifier: Apache-2.0
"""Worlds of the benchmarks: ranks forked from a process that has imported the libraries."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def enter(rank: int, world: int, port: int) -> None:
    """Give a forked rank the environment that torchrun would; the store at `port` is its parent's."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )


def fork_world(world: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, world, port, *args)` on every rank; this process hosts the store."""
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(work, (world, store.port, *args), nprocs=world, start_method="fork")
