# SPDX-License-Identifier: Apache-2.0
"""This rank's place in the trainer's grid and in the engine's, the groups of both, and small world collectives.

The grids (megatron_rl/runtime/grid.py) are either the same ranks (colocated: every rank trains and holds a part of an
engine) or have none in common (disaggregated: each part of the world is a world of its own to Megatron-core or vLLM).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rl.runtime.device import Backend
from megatron_rl.runtime.grid import Grid, GridCoord

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParallelMesh:
    """This rank among all ranks of the job, and both grids over them."""

    rank: int
    trainer: Grid
    engine: Grid
    context_comm: str = "all_gather"
    """How context parallel ranks exchange what attention needs: all_gather, p2p (ring) or a2a (heads)."""
    link: dist.ProcessGroup | None = None
    """The group of all ranks, over which weights travel; None where that is the default group."""

    @property
    def world(self) -> int:
        return max(self.trainer.ranks.stop, self.engine.ranks.stop)

    @property
    def trains(self) -> bool:
        return self.rank in self.trainer.ranks

    @property
    def here(self) -> GridCoord:
        """Place in the trainer's grid."""
        return self.trainer.coord(self.rank)

    def slot(self, is_expert: bool) -> tuple[int, int]:
        """(which, of how many) shards of a parameter this rank trains."""
        return self.trainer.slot(self.rank, is_expert)

    @property
    def expert_rank(self) -> int:
        return self.trainer.expert_rank(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.here.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.here.pp == self.trainer.pipeline - 1

    @property
    def chunks(self) -> tuple[int | None, ...]:
        """Numbers of this stage's model chunks; one without a number where the pipeline is not virtual."""
        return tuple(range(self.trainer.virtual)) if self.trainer.virtual > 1 else (None,)

    @property
    def num_replicas(self) -> int:
        return self.engine.data

    @property
    def replica(self) -> int:
        return self.engine.coord(self.rank).dp

    @property
    def engine_tp_rank(self) -> int:
        return self.engine.coord(self.rank).tp

    @property
    def speaks_for_replica(self) -> bool:
        """All tensor parallel ranks of an engine see the same completions; the first one reports them."""
        return self.engine_tp_rank == 0


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def initialize(backend: Backend, trainer: Grid, engine: Grid, context_comm: str = "all_gather") -> ParallelMesh:
    """Join the world, if that is not done yet, and build Megatron-core's groups on the trainer's ranks.

    Where the engine has ranks of its own, each of its replicas and the trainer become worlds of their own.
    """
    join_world(backend)
    rank, link = dist.get_rank(), None
    mesh = ParallelMesh(rank, trainer, engine, context_comm)
    assert mesh.world == dist.get_world_size(), f"{dist.get_world_size()} ranks; the grids have {mesh.world}"
    if trainer.ranks != engine.ranks:
        parts = parts_of_world(trainer, engine)
        assert sorted(r for part in parts for r in part) == list(range(mesh.world)), f"ranks shared or idle: {parts}"
        link = enter_part(parts)
        mesh = ParallelMesh(rank, trainer, engine, context_comm, link)
    if mesh.trains:
        _build_trainer_groups(backend, trainer)
    return mesh


def join_world(backend: Backend) -> None:
    """Join the world that torchrun started, or a world of one, without any group in it; once. Collective."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=os.environ.get("MASTER_PORT", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            backend.process_group,
            timeout=datetime.timedelta(minutes=30),
            device_id=backend.bound_device(local_rank),
        )


def _build_trainer_groups(backend: Backend, grid: Grid) -> None:
    """An expert is never split: gloo cannot gather the uneven numbers of tokens that this takes."""
    from megatron.core import parallel_state, tensor_parallel

    assert grid.expert_tensor == 1
    with backend.mcore_scope():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=grid.tensor,
            pipeline_model_parallel_size=grid.pipeline,
            virtual_pipeline_model_parallel_size=grid.virtual if grid.virtual > 1 else None,
            context_parallel_size=grid.context,
            expert_model_parallel_size=grid.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)


def parts_of_world(trainer: Grid, engine: Grid) -> list[range]:
    """The trainer's ranks, then those of each replica of the engine."""
    first, stop = engine.ranks.start, engine.ranks.stop
    return [trainer.ranks, *(range(rank, rank + engine.tensor) for rank in range(first, stop, engine.tensor))]


def enter_part(parts: Sequence[range]) -> dist.ProcessGroup:
    """Make this rank's part of the world its default group; returns the group of the whole world. Collective.

    Megatron-core and vLLM build their groups over the default group and take no other: `init_distributed_environment`
    of vLLM has no argument for one, and its external launcher reads RANK. torch sets the default group only when the
    world is joined, hence the private call. `dist.get_rank(world)` is wrong afterwards; `world.rank()` is right.
    """
    world = dist.group.WORLD
    assert world is not None
    rank = dist.get_rank()
    groups = [dist.new_group(list(part)) for part in parts]
    mine = next(index for index, part in enumerate(parts) if rank in part)
    distributed_c10d._update_default_pg(groups[mine])
    os.environ.update(RANK=str(parts[mine].index(rank)), WORLD_SIZE=str(len(parts[mine])))
    return world


def shut_down() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_lists(items: Sequence[T]) -> list[T]:
    """Concatenate every rank's list, in rank order, on every rank. For small objects: prompts, completions, scores."""
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]


def reduce_max(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
