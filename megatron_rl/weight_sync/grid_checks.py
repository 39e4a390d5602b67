# SPDX-License-Identifier: Apache-2.0
"""Which grids a model does not take, on either side, all problems at once. For planning: no torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_rl.runtime.grid import Grid, GridProblem
from model_providers.shape import TransformerShape
from model_providers.weight_map import Entry, WeightMap

TRAIN_SIZES = {
    "tp": "tensor",
    "pp": "pipeline",
    "vp": "virtual",
    "cp": "context",
    "ep": "expert",
    "etp": "expert_tensor",
}
ROLLOUT_SIZES = {"tp": "tensor"}


def grid_problems(shape: TransformerShape, weights: WeightMap, trainer: Grid, engine: Grid) -> list[str]:
    """One line per problem, in the words of plan_sync's options; empty when a sync can be planned."""
    if trainer.world < 1:
        return [f"--gpus={trainer.world}: must be at least 1"]
    of_trainer, of_engine = trainer.shape_problems(shape), engine.engine_problems(shape)
    told = [
        *_told("--train ", [*trainer.rank_problems(), *of_trainer]),
        *_told("--rollout ", [*engine.rank_problems(), *of_engine]),
    ]
    if trainer.too_small() or engine.too_small():
        return told
    for entry in weights.entries.values():
        in_layer = entry.mcore.startswith("decoder.layers.")
        if in_layer and not entry.mcore.startswith("decoder.layers.0."):
            continue  # layers are alike
        if not (in_layer and of_trainer):
            told += _refusals("--train", entry, entry.layout.trainer, trainer.num_slots(entry.layout.is_expert))
        if not (in_layer and of_engine):
            told += _refusals("--rollout", entry, entry.layout.engine, engine.tensor)
    return told


def _told(option: str, problems: Sequence[GridProblem]) -> list[str]:
    names = {field: name for name, field in TRAIN_SIZES.items()}
    return [problem.told(option, names, "*") for problem in problems]


def _refusals(option: str, entry: Entry, shard_of: Callable[..., object], num_shards: int) -> Iterator[str]:
    """What the weight table itself refuses: sizes that a grid does not know, such as the padded vocabulary's."""
    try:
        shard_of(entry.hf, 0, num_shards)
    except ValueError as error:
        yield f"{option}: {error}"
