# SPDX-License-Identifier: Apache-2.0
"""Trainer and engine on ranks of their own: each part is a world of its own to its library, and all stay linked."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import choose_backend
from megatron_rl.runtime.grid import Grid
from tests.world import WorldFailed, run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

BACKEND = choose_backend("cpu", "float32")


def _world_of_vllm() -> int:
    """The number of ranks that vLLM takes for its world when its external launcher starts a replica of one rank."""
    from vllm.distributed import init_distributed_environment
    from vllm.distributed.parallel_state import get_world_group

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_distributed_environment(world, rank, "env://", local_rank=0, backend="gloo")
    return get_world_group().world_size


def _replicas_of_one(rank: int, in_parts: bool) -> int:
    dist.init_process_group("gloo")
    if in_parts:
        parallel.enter_part([range(0, 1), range(1, 2)])
    return _world_of_vllm()


def test_vllm_sees_its_part_and_without_the_adaptation_the_world() -> None:
    """When the second line fails, vLLM takes a group of its own and `enter_part` is no longer needed for it."""
    assert run_world(2, _replicas_of_one, True) == [1, 1]
    assert run_world(2, _replicas_of_one, False) == [2, 2]


def _join(rank: int, trainer: Grid, engine: Grid) -> dict[str, object]:
    mesh = parallel.initialize(BACKEND, trainer, engine)
    link = mesh.link
    assert link is not None
    ones = torch.ones(1), torch.ones(1)
    dist.all_reduce(ones[0])
    dist.all_reduce(ones[1], group=link)
    found = {
        "part": (dist.get_rank(), dist.get_world_size(), os.environ["RANK"], os.environ["WORLD_SIZE"]),
        "link": (mesh.rank, link.rank(), link.size(), mesh.world),
        "reduced": (int(ones[0]), int(ones[1])),
        "names": parallel.gather_lists([rank]),
    }
    if mesh.trains:
        tensor = parallel_state.get_tensor_model_parallel_group()
        found["megatron"] = (mesh.here.tp, tensor.rank(), tensor.size(), parallel_state.get_data_parallel_world_size())
    else:
        found["engine"] = (mesh.replica, mesh.engine_tp_rank, mesh.speaks_for_replica)
    parallel.shut_down()
    assert not dist.is_initialized()
    return found


@pytest.mark.parametrize("first", [0, 3])  # the trainer's ranks before the engine's, and after them
def test_each_part_is_a_world_of_its_own_and_all_are_linked(first: int) -> None:
    trainer = Grid(2, first_rank=first, tensor=2)
    engine = Grid(3, first_rank=0 if first else 2)
    ranks = run_world(5, _join, trainer, engine)
    for rank, found in enumerate(ranks):
        assert found["link"] == (rank, rank, 5, 5)
        if rank in trainer.ranks:
            tp = rank - first
            assert found["part"] == (tp, 2, str(tp), "2") and found["reduced"] == (2, 5)
            assert found["names"] == [first, first + 1]
            assert found["megatron"] == (tp, tp, 2, 1)
        else:
            assert found["part"] == (0, 1, "0", "1") and found["reduced"] == (1, 5)
            assert found["names"] == [rank]
            assert found["engine"] == (rank - engine.first_rank, 0, True)


def _join_only(rank: int, trainer: Grid, engine: Grid) -> None:
    parallel.initialize(BACKEND, trainer, engine)


@pytest.mark.parametrize(
    ("trainer", "engine"),
    [(Grid(2), Grid(2, first_rank=1)), (Grid(1), Grid(1, first_rank=2)), (Grid(1), Grid(1, first_rank=1))],
)
def test_ranks_that_are_shared_in_part_or_idle_are_refused(trainer: Grid, engine: Grid) -> None:
    with pytest.raises(WorldFailed, match="ranks shared or idle|the grids have 2"):
        run_world(3, _join_only, trainer, engine)
