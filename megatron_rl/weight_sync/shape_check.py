# SPDX-License-Identifier: Apache-2.0
"""Whether trainer and engine weights fit together, told in one message before any byte moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_rl.errors import WeightMismatch
from megatron_rl.runtime.grid import Grid
from model_providers.weight_map import WeightMap


def check_fit(
    weights: WeightMap,
    trainer: Grid,
    engine: Grid,
    rank: int,
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
) -> None:
    """Raise one WeightMismatch that lists every parameter that is missing, unknown or misshapen on either side.

    `source` and `target` are {name: tensor} of this rank; empty on a rank that the grid of that side does not have.
    """
    problems: list[str] = []
    if rank in engine.ranks:
        problems += _engine_problems(weights, engine.slot(rank, is_expert=False), target)
    if rank in trainer.ranks:
        problems += _trainer_problems(weights, trainer, rank, source)
    if problems:
        raise WeightMismatch("trainer and engine weights do not fit:\n  " + "\n  ".join(problems))


def _engine_problems(weights: WeightMap, slot: tuple[int, int], target: Mapping[str, Tensor]) -> Iterator[str]:
    entries = weights.engine_entries()
    for name in sorted(target.keys() ^ entries.keys()):
        yield f"{name}: not in {'the weight table' if name in target else 'the engine'}"
    for name in sorted(target.keys() & entries.keys()):
        try:
            expected = entries[name].layout.engine(entries[name].hf, *slot).shape
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        if tuple(target[name].shape) != expected:
            yield f"{name}: the engine has shape {list(target[name].shape)}, expected {list(expected)}"


def _trainer_problems(weights: WeightMap, trainer: Grid, rank: int, source: Mapping[str, Tensor]) -> Iterator[str]:
    for name, parameter in source.items():
        if name not in weights.entries:
            yield f"{name}: a Megatron parameter that is not in the weight table"
            continue
        entry = weights[name]
        expected = entry.layout.trainer(entry.hf, *trainer.slot(rank, entry.layout.is_expert)).shape
        if tuple(parameter.shape) != expected:
            yield f"{name}: the trainer has shape {list(parameter.shape)}, expected {list(expected)}"
