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


def size_problems(
    trainer: Grid, engine: Grid | None, shape: TransformerShape, context_comm: str, world: int = 0
) -> Iterator[str]:
    """Sizes against those of the model; what is wrong with the trainer ends with sizes that fit `world` ranks."""
    found = list(_told("parallel.", [*trainer.shape_problems(shape), *trainer.run_problems(shape, context_comm)]))
    if found:
        found[-1] += _sizes_that_fit(shape, context_comm, world)
    yield from found
    if engine is not None:
        yield from _told("rollout.", engine.engine_problems(shape))


def _sizes_that_fit(shape: TransformerShape, context_comm: str, world: int) -> str:
    """Of tensor, pipeline and context parallel, those that by themselves share the model or a sequence most widely."""
    names = []
    for name in ("tensor", "pipeline", "context"):
        grids = (Grid(world, **{name: size}) for size in range(world, 1, -1) if world % size == 0)
        fits = (grid for grid in grids if not grid.problems(shape) and not grid.run_problems(shape, context_comm))
        if (grid := next(fits, None)) is not None:
            names.append(f"{name}={getattr(grid, name)}")
    return f"; on {world} ranks these fit, each by itself: {', '.join(names)}, or none" if names else ""


def _told(section: str, problems: Sequence[GridProblem]) -> Iterator[str]:
    return (problem.told(section, {"virtual": "virtual_pipeline"}) for problem in problems)
