# SPDX-License-Identifier: Apache-2.0
"""The sizes of both grids and what follows from them by counting: stages, replicas, micro-batches in flight."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import RlConfig
from megatron_rl.planner.activations import ActivationSplit

BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}  # model.dtype; auto is bfloat16 on a GPU


@dataclass(frozen=True, slots=True)
class Layout:
    """Trainer's grid (tensor, pipeline, virtual, context, expert; the rest is data parallel) and the engine's."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    rollout_tensor: int

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def optimizer_shards(self) -> int:
        """Ranks over which the distributed optimizer spreads its state."""
        return self.data * self.context

    @property
    def num_replicas(self) -> int:
        return self.world // self.rollout_tensor

    def __str__(self) -> str:
        return f"{self.trainer}, vLLM {self.num_replicas} x TP{self.rollout_tensor}"

    @property
    def trainer(self) -> str:
        """The trainer's half of the name."""
        sizes = [f"TP{self.tensor}", f"PP{self.pipeline}", f"CP{self.context}", f"DP{self.data}"]
        if self.virtual > 1:
            sizes.insert(2, f"VP{self.virtual}")
        if self.expert > 1:
            sizes.append(f"EP{self.expert}")
        return " ".join(sizes)


def layout_of(cfg: RlConfig, world: int) -> Layout:
    sizes = cfg.parallel
    return Layout(
        world,
        sizes.tensor,
        sizes.pipeline,
        sizes.virtual_pipeline,
        sizes.context,
        sizes.expert,
        cfg.rollout.tensor,
    )


def split_of(cfg: RlConfig) -> ActivationSplit:
    return ActivationSplit(
        tensor=cfg.parallel.tensor,
        context=cfg.parallel.context,
        context_comm=cfg.parallel.context_comm,
        recompute=cfg.model.recompute,
        element=BYTES[cfg.model.dtype],
    )


def chunks_in_flight(layout: Layout, stage: int, num_microbatches: int) -> int:
    """Model chunks (a whole stage, unless virtual) whose activations stage `stage` holds at its fullest, a chunk once
    for each micro-batch. 1F1B: as many as there are stages from here to the last; interleaved: Megatron-core's warm-up
    and one."""
    ahead = layout.pipeline - 1 - stage
    if layout.virtual == 1:
        return min(num_microbatches, ahead + 1)
    warm_up = 2 * ahead + (layout.virtual - 1) * layout.pipeline + 1
    return min(num_microbatches * layout.virtual, warm_up)
