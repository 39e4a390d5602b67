# SPDX-License-Identifier: Apache-2.0
"""Who is who: the trainer's groups (Megatron-core's), the rollout replicas (vLLM's), and small world collectives.

trainer   torch.arange(world).view(pp, dp, cp, tp)      Megatron-core's order "tp-cp-dp-pp"
rollout   torch.arange(world).view(replica, tp)         vLLM's order: tensor parallel ranks are consecutive
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rl.runtime.device import Backend

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainCoord:
    """Place of one rank in the trainer's grid."""

    tp: int
    pp: int
    dp: int
    cp: int


@dataclass(frozen=True, slots=True)
class ParallelMesh:
    """Sizes of both grids and this rank's place in them. Everything is arithmetic on ranks; no hidden state."""

    rank: int
    world: int
    tensor: int
    pipeline: int
    context: int
    rollout_tensor: int
    expert: int = 1
    virtual: int = 1
    context_comm: str = "all_gather"
    """How context parallel ranks exchange what attention needs: all_gather, p2p (ring) or a2a (heads)."""

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def num_replicas(self) -> int:
        return self.world // self.rollout_tensor

    def coord(self, rank: int) -> TrainCoord:
        rest, tp = divmod(rank, self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        return TrainCoord(tp=tp, pp=pp, dp=dp, cp=cp)

    @property
    def here(self) -> TrainCoord:
        return self.coord(self.rank)

    @property
    def expert_rank(self) -> int:
        """Expert parallel ranks are consecutive within a stage, across tensor and data parallel ranks alike."""
        return self.rank % (self.world // self.pipeline) % self.expert

    def slot(self, is_expert: bool) -> tuple[int, int]:
        """(which, of how many) shards of a parameter this rank holds."""
        return (self.expert_rank, self.expert) if is_expert else (self.here.tp, self.tensor)

    @property
    def is_first_stage(self) -> bool:
        return self.here.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.here.pp == self.pipeline - 1

    @property
    def chunks(self) -> tuple[int | None, ...]:
        """Numbers of this stage's model chunks; one without a number where the pipeline is not virtual."""
        return tuple(range(self.virtual)) if self.virtual > 1 else (None,)

    @property
    def replica(self) -> int:
        return self.rank // self.rollout_tensor

    @property
    def rollout_tp_rank(self) -> int:
        return self.rank % self.rollout_tensor

    @property
    def speaks_for_replica(self) -> bool:
        """All tensor parallel ranks of an engine see the same completions; the first one reports them."""
        return self.rollout_tp_rank == 0


def initialize(
    backend: Backend,
    tensor: int,
    pipeline: int,
    context: int,
    rollout_tensor: int,
    expert: int = 1,
    virtual: int = 1,
    context_comm: str = "all_gather",
) -> ParallelMesh:
    """Join the world that torchrun started (or a world of one) and build Megatron-core's groups.

    An expert is never cut: gloo cannot gather the uneven numbers of tokens that this takes.
    """
    from megatron.core import parallel_state, tensor_parallel

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
    with backend.mcore_scope():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
    rank, world = dist.get_rank(), dist.get_world_size()
    return ParallelMesh(rank, world, tensor, pipeline, context, rollout_tensor, expert, virtual, context_comm)


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
