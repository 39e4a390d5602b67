# SPDX-License-Identifier: Apache-2.0
"""Whether trainer and engine weights fit together, told in one message before any byte moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_rl.errors import WeightMismatch
from model_providers.weight_map import WeightMap


def check_fit(
    weights: WeightMap,
    trainer_tp: int,
    tensor: int,
    engine_tp: int,
    rollout_tensor: int,
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    expert_slot: tuple[int, int] = (0, 1),
) -> None:
    """Raise one WeightMismatch that lists every parameter that is missing, unknown or misshapen on either side.

    `expert_slot`: which, of how many, shards of the experts this rank trains.
    """
    problems = [
        *_engine_problems(weights, engine_tp, rollout_tensor, target),
        *_trainer_problems(weights, (trainer_tp, tensor), expert_slot, source),
    ]
    if problems:
        raise WeightMismatch("trainer and engine weights do not fit:\n  " + "\n  ".join(problems))


def _engine_problems(
    weights: WeightMap, engine_tp: int, rollout_tensor: int, target: Mapping[str, Tensor]
) -> Iterator[str]:
    entries = weights.engine_entries()
    for name in sorted(target.keys() ^ entries.keys()):
        yield f"{name}: not in {'the weight table' if name in target else 'the engine'}"
    for name in sorted(target.keys() & entries.keys()):
        try:
            expected = entries[name].layout.engine(entries[name].hf, engine_tp, rollout_tensor).shape
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        if tuple(target[name].shape) != expected:
            yield f"{name}: the engine has shape {list(target[name].shape)}, expected {list(expected)}"


def _trainer_problems(
    weights: WeightMap, slot: tuple[int, int], expert_slot: tuple[int, int], source: Mapping[str, Tensor]
) -> Iterator[str]:
    for name, parameter in source.items():
        if name not in weights.entries:
            yield f"{name}: a Megatron parameter that is not in the weight table"
            continue
        entry = weights[name]
        expected = entry.layout.trainer(entry.hf, *(expert_slot if entry.layout.is_expert else slot)).shape
        if tuple(parameter.shape) != expected:
            yield f"{name}: the trainer has shape {list(parameter.shape)}, expected {list(expected)}"
