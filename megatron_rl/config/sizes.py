# SPDX-License-Identifier: Apache-2.0
"""The parallel sizes of a recipe as grids, and what is wrong with them in the recipe's words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.runtime.grid import Grid, GridProblem
from model_providers.shape import TransformerShape


def trainer_grid(parallel: ParallelConfig, world: int) -> Grid:
    return Grid(
        world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        virtual=parallel.virtual_pipeline,
    )


def rank_problems(trainer: Grid, engine: Grid | None) -> Iterator[str]:
    """Sizes against the number of ranks; sizes below 1 are out of their range and told with the ranges."""
    if not trainer.too_small():
        yield from _told("parallel.", trainer.rank_problems())
    if engine is not None and not engine.too_small():
        yield from _told("rollout.", engine.rank_problems())


def size_problems(trainer: Grid, engine: Grid | None, shape: TransformerShape, context_comm: str) -> Iterator[str]:
    """Sizes against those of the model."""
    yield from _told("parallel.", [*trainer.shape_problems(shape), *trainer.run_problems(shape, context_comm)])
    if engine is not None:
        yield from _told("rollout.", engine.engine_problems(shape))


def _told(section: str, problems: Sequence[GridProblem]) -> Iterator[str]:
    return (problem.told(section, {"virtual": "virtual_pipeline"}) for problem in problems)
