# SPDX-License-Identifier: Apache-2.0
"""Which rank should hold which engine shard so that most bytes are already where they are needed.

An assignment of ranks to engine shards, as many ranks to each: ranks that overlap equally with every shard form a
class, and classes fill shards along best augmenting paths, which is exact. Replicas stay on one node where they fit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import wanted_rectangles, world_of
from model_providers.weight_map import WeightMap

Counts = NDArray[np.int64]

NEVER = -(1 << 60)  # below any sum of element counts


def overlap(weights: WeightMap, num_layers: int, trainer: Grid, engine: Grid) -> Counts:
    """[rank of the engine's grid, engine shard]: elements of that shard which the rank's trainer shard holds."""
    total = np.zeros((world_of(trainer, engine), engine.tensor), np.int64)
    for wanted in wanted_rectangles(weights, num_layers, trainer, engine):
        for holder in wanted.holders:
            total[holder.ranks, wanted.engine_tp] += wanted.target.numel
    return total[engine.ranks.start : engine.ranks.stop]


def best_placement(held: Counts, ranks_per_node: int) -> tuple[int, ...]:
    """Place of each rank in the engine's grid (`ReshardPlan.engine_position`), from the `overlap` of ranks and shards.

    Each node is placed by itself if replicas fit on nodes evenly; else the world is placed as if it were one node.
    """
    world, num_shards = held.shape
    node = min(ranks_per_node, world)
    if node % num_shards or world % node:
        node = world
    position = np.empty(world, np.int64)
    for first in range(0, world, node):
        shards = _best_shards(held[first : first + node])
        for shard in range(num_shards):
            ranks = first + np.flatnonzero(shards == shard)
            position[ranks] = first + np.arange(len(ranks)) * num_shards + shard
    return tuple(position.tolist())


def ranks_in_order(engine_position: tuple[int, ...]) -> tuple[int, ...]:
    """The same permutation seen from the engine: which rank stands at place 0, 1, ... of its grid."""
    return tuple(np.argsort(engine_position).tolist())


def _best_shards(held: Counts) -> Counts:
    """The shard of each rank; the usual order (consecutive ranks) where none is better."""
    num_ranks, num_shards = held.shape
    usual = np.arange(num_ranks) % num_shards
    classes, class_of, sizes = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    flow = most_valuable_flow(classes, sizes, num_ranks // num_shards)
    if (flow * classes).sum() == held[np.arange(num_ranks), usual].sum():
        return usual
    shards = np.empty(num_ranks, np.int64)
    for index, per_shard in enumerate(flow):
        shards[class_of.ravel() == index] = np.repeat(np.arange(num_shards), per_shard)
    return shards


def most_valuable_flow(values: Counts, supply: Counts, capacity: int) -> Counts:
    """How many units of each class go to each shard, `capacity` to a shard, for the largest sum of values.

    Classes enter one after the other, each along the path of greatest gain: into a shard, from which a unit of another
    class moves on, and so forth. The flow is optimal for the classes entered so far, as in the Hungarian method.
    """
    flow = np.zeros(values.shape, np.int64)
    free = np.full(values.shape[1], capacity)
    for entering, units in enumerate(supply):
        left = int(units)
        while left:
            steps, last = _best_path(values, flow, free, entering)
            amount = min(left, int(free[last]), *(int(flow[unit, start]) for unit, start, _ in steps))
            first = steps[0][1] if steps else last
            flow[entering, first] += amount
            for unit, start, stop in steps:
                flow[unit, start] -= amount
                flow[unit, stop] += amount
            free[last] -= amount
            left -= amount
    return flow


Move = tuple[int, int, int]  # a unit of class ... moves from shard ... to shard ...


def _best_path(values: Counts, flow: Counts, free: Counts, entering: int) -> tuple[list[Move], int]:
    """The moves, first to last, that make room for one more unit of `entering`, and the shard that grows (Bellman-
    Ford over shards)."""
    moves = np.where(flow[:, :, None] > 0, values[:, None, :] - values[:, :, None], NEVER)
    mover, gain_of_move = moves.argmax(axis=0), moves.max(axis=0)
    gain = values[entering].copy()
    came_from = np.full(len(free), -1)
    while True:
        through = gain[:, None] + gain_of_move
        better = through.max(axis=0) > gain
        if not better.any():
            break
        came_from[better] = through.argmax(axis=0)[better]
        gain[better] = through.max(axis=0)[better]
    last = stop = int(np.where(free > 0, gain, NEVER * 2).argmax())
    steps: list[Move] = []
    while came_from[stop] >= 0:
        start = int(came_from[stop])
        steps.append((int(mover[start, stop]), start, stop))
        stop = start
    return steps[::-1], last
