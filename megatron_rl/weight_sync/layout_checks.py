# SPDX-License-Identifier: Apache-2.0
"""Which layouts a model does not take, on either side, all problems at once. For planning: no torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_rl.weight_sync.plan import Layouts
from model_providers.shape import TransformerShape
from model_providers.weight_map import Entry, WeightMap


def layout_problems(shape: TransformerShape, weights: WeightMap, layouts: Layouts) -> list[str]:
    """One line per problem, in the words of plan_sync's options; empty when the layouts can be planned."""
    sizes = {
        "--gpus": layouts.world,
        "--train tp": layouts.tensor,
        "--train pp": layouts.pipeline,
        "--train vp": layouts.virtual,
        "--train cp": layouts.context,
        "--train ep": layouts.expert,
        "--train etp": layouts.expert_tensor,
        "--rollout tp": layouts.rollout_tensor,
    }
    if too_small := [f"{name}={size}: must be at least 1" for name, size in sizes.items() if size < 1]:
        return too_small
    return [
        *_grid(layouts),
        *_experts(weights, layouts),
        *_layers(shape, layouts),
        *_heads(shape, layouts),
        *_shards(shape, weights, layouts),
    ]


def _grid(layouts: Layouts) -> Iterator[str]:
    world = layouts.world
    grids = {
        "--train tp*pp*cp": layouts.tensor * layouts.pipeline * layouts.context,
        "--train ep*etp*pp": layouts.expert * layouts.expert_tensor * layouts.pipeline,
        "--rollout tp": layouts.rollout_tensor,
    }
    for name, size in grids.items():
        if world % size:
            yield f"--gpus={world}: not a multiple of {name}={size}; choose a multiple"


def _experts(weights: WeightMap, layouts: Layouts) -> Iterator[str]:
    if any(entry.layout.is_expert for entry in weights.entries.values()):
        return
    for name, size in (("--train ep", layouts.expert), ("--train etp", layouts.expert_tensor)):
        if size > 1:
            yield f"{name}={size}: the model has no experts; leave it out"


def _layers(shape: TransformerShape, layouts: Layouts) -> Iterator[str]:
    if layouts.virtual > 1 and layouts.pipeline == 1:
        yield f"--train vp={layouts.virtual}: one pipeline stage has no virtual ones; set pp above 1 or leave vp out"
    chunks = layouts.pipeline * layouts.virtual
    if shape.num_layers % chunks:
        yield f"--train pp*vp={chunks}: does not divide {shape.num_layers} layers; use a divisor"


def _heads(shape: TransformerShape, layouts: Layouts) -> Iterator[str]:
    yield from _head_problems(shape, "--train tp", layouts.tensor)
    yield from _head_problems(shape, "--rollout tp", layouts.rollout_tensor)


def _head_problems(shape: TransformerShape, option: str, size: int) -> Iterator[str]:
    if shape.num_heads % size:
        yield f"{option}={size}: does not divide {shape.num_heads} attention heads; use a divisor"
    if shape.num_groups % size and size % shape.num_groups:
        yield f"{option}={size}: neither divides nor is a multiple of {shape.num_groups} KV heads; change it"


def _shards(shape: TransformerShape, weights: WeightMap, layouts: Layouts) -> Iterator[str]:
    """What the weight table itself refuses; attention only if its heads are fine, which says the same more plainly."""
    attention_fits = {size: not [*_head_problems(shape, "", size)] for size in (layouts.tensor, layouts.rollout_tensor)}
    for entry in weights.entries.values():
        if entry.mcore.startswith("decoder.layers.") and not entry.mcore.startswith("decoder.layers.0."):
            continue  # layers are alike
        is_attention = "self_attention" in entry.mcore
        num_slots = layouts.num_slots(entry.layout.is_expert)
        if attention_fits[layouts.tensor] or not is_attention:
            yield from _refusals("--train", entry, entry.layout.trainer, num_slots)
        if attention_fits[layouts.rollout_tensor] or not is_attention:
            yield from _refusals("--rollout", entry, entry.layout.engine, layouts.rollout_tensor)


def _refusals(option: str, entry: Entry, cut: Callable[..., object], num_shards: int) -> Iterator[str]:
    try:
        cut(entry.hf, 0, num_shards)
    except ValueError as error:
        yield f"{option}: {error}"
