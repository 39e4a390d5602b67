# SPDX-License-Identifier: Apache-2.0
"""Names of grids for people, and what follows from their sizes by counting: micro-batches in flight."""

from __future__ import annotations

from megatron_rl.config.schema import RlConfig
from megatron_rl.planner.activations import ActivationSplit
from megatron_rl.runtime.grid import Grid

BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}  # model.dtype; auto is bfloat16 on a GPU


def trainer_name(grid: Grid) -> str:
    sizes = [f"TP{grid.tensor}", f"PP{grid.pipeline}", f"CP{grid.context}", f"DP{grid.data}"]
    if grid.virtual > 1:
        sizes.insert(2, f"VP{grid.virtual}")
    if grid.expert > 1:
        sizes.append(f"EP{grid.expert}")
    return " ".join(sizes)


def layout_name(trainer: Grid, engine: Grid) -> str:
    return f"{trainer_name(trainer)}, vLLM {engine.data} x TP{engine.tensor}"


def split_of(cfg: RlConfig) -> ActivationSplit:
    return ActivationSplit(
        tensor=cfg.parallel.tensor,
        context=cfg.parallel.context,
        context_comm=cfg.parallel.context_comm,
        recompute=cfg.model.recompute,
        element=BYTES[cfg.model.dtype],
    )


def chunks_in_flight(trainer: Grid, stage: int, num_microbatches: int) -> int:
    """Model chunks (a whole stage, unless virtual) whose activations stage `stage` holds at its fullest, a chunk once
    for each micro-batch. 1F1B: as many as there are stages from here to the last; interleaved: Megatron-core's warm-up
    and one."""
    behind = trainer.pipeline - 1 - stage
    if trainer.virtual == 1:
        return min(num_microbatches, behind + 1)
    warm_up = 2 * behind + (trainer.virtual - 1) * trainer.pipeline + 1
    return min(num_microbatches * trainer.virtual, warm_up)
