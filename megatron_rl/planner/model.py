# SPDX-License-Identifier: Apache-2.0
"""A model as far as planning needs it, from its config.json or, where there is none, from the published numbers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_rl.planner.towers import Tower, tower_of
from model_providers.family import Config, read_config, shape_and_weights
from model_providers.known import KNOWN_CONFIGS
from model_providers.shape import TransformerShape
from model_providers.weight_map import Entry, WeightMap


@dataclass(frozen=True, slots=True, eq=False)
class PlannedModel:
    """`source` says where the numbers are from."""

    name: str
    source: str
    shape: TransformerShape
    weights: WeightMap
    tower: Tower | None


@dataclass(frozen=True, slots=True)
class StageParams:
    """Parameters of one pipeline stage on one rank; `largest` is the biggest single one, `trained` are not frozen."""

    total: int
    trained: int
    largest: int


def load_planned_model(folder: str) -> PlannedModel:
    """From `folder`/config.json; else from the published model that the folder is named after."""
    path = Path(folder) / "config.json"
    known = Path(folder).name.removesuffix("-Instruct")
    if path.is_file():
        config, source = read_config(folder), str(path)
    elif known in KNOWN_CONFIGS:
        config, source = KNOWN_CONFIGS[known], f"published numbers of {known}"
    else:
        names = ", ".join(KNOWN_CONFIGS)
        raise ValueError(f"model.hf={folder}: has no config.json; give a checkpoint's folder, or a name of {names}")
    return planned_model(Path(folder).name, source, config)


def planned_model(name: str, source: str, config: Config) -> PlannedModel:
    shape, weights = shape_and_weights(config, name)
    try:
        tower = tower_of(config)
    except KeyError as error:
        raise ValueError(f"model.hf={name}: config.json has no {error.args[0]!r}; give a complete one") from error
    return PlannedModel(name, source, shape, weights, tower)


@functools.lru_cache(maxsize=4096)
def stage_params(
    model: PlannedModel, tensor: int, pipeline: int, stage: int, expert: int = 1, freeze: tuple[str, ...] = ()
) -> StageParams:
    """Exact, padding of the vocabulary included: the shapes are those of the weight table. Layers are alike."""
    layers = model.shape.num_layers // pipeline
    total = trained = largest = 0
    for name, entry in model.weights.entries.items():
        count = _copies_here(model.shape, name, pipeline, stage, layers)
        if not count:
            continue
        size = _size(entry, tensor, expert)
        total += count * size
        largest = max(largest, size)
        if not any(fnmatchcase(name, pattern) for pattern in freeze):
            trained += count * size
    return StageParams(total, trained, largest)


@functools.lru_cache(maxsize=4096)
def engine_params(model: PlannedModel, tensor: int) -> int:
    """Parameters of the language model on one rank of a vLLM replica."""
    entries = model.weights.engine_entries().values()
    return sum(math.prod(entry.layout.engine(entry.hf, 0, tensor).shape) for entry in entries)


def _copies_here(shape: TransformerShape, name: str, pipeline: int, stage: int, layers: int) -> int:
    """How many parameters like `name` the stage has: a layer's first one stands for those of all layers."""
    if name.startswith("decoder.layers."):
        return layers if name.startswith("decoder.layers.0.") else 0
    if name.startswith("embedding."):
        return int(stage == 0)
    is_last = stage == pipeline - 1
    if name == "output_layer.weight" and shape.tied_embeddings and pipeline == 1:
        return 0  # the embedding itself; a last stage of its own has a copy
    return int(is_last)


def _size(entry: Entry, tensor: int, expert: int) -> int:
    world = expert if entry.layout.is_expert else tensor
    return math.prod(entry.layout.trainer(entry.hf, 0, world).shape)
