# SPDX-License-Identifier: Apache-2.0
"""The placement advisor against every possible placement, and what it makes of real models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.placement import best_placement, most_valuable_flow, overlap, ranks_in_order
from megatron_rl.weight_sync.plan import build_plan
from model_providers.qwen2_5_vl.weights import weight_map
from model_providers.shape import RopeSettings, TransformerShape

SHAPE = TransformerShape(
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=8,
    num_groups=2,
    head_dim=2,
    vocab_size=320,
    rms_eps=1e-6,
    rope=RopeSettings(1e4, 2),
    qkv_bias=True,
    tied_embeddings=False,
    max_positions=64,
)


def kept(held: np.ndarray, position: tuple[int, ...]) -> int:
    """Elements that need not move when rank r stands at position[r] of the engine's grid."""
    return sum(int(held[rank, place % held.shape[1]]) for rank, place in enumerate(position))


def best_by_trying_all(held: np.ndarray) -> int:
    num_ranks, num_shards = held.shape
    shards = sorted(np.arange(num_ranks) % num_shards)
    return max(sum(held[rank, s] for rank, s in enumerate(order)) for order in set(itertools.permutations(shards)))


LAYOUTS = [
    (Grid(4, tensor=4), Grid(4, tensor=2)),
    (Grid(4, tensor=2, pipeline=2), Grid(4, tensor=4)),
    (Grid(8, tensor=4, pipeline=2), Grid(8, tensor=2)),
    (Grid(8, tensor=4, pipeline=2), Grid(8, tensor=4)),
    (Grid(8, tensor=8), Grid(8, tensor=2)),
    (Grid(8, tensor=2, pipeline=2, context=2), Grid(8, tensor=4)),
    (Grid(8, pipeline=4), Grid(8, tensor=2)),
    (Grid(6, tensor=2), Grid(6)),
]


@pytest.mark.parametrize(("trainer", "engine"), LAYOUTS, ids=lambda g: f"{g.world}-{g.tensor}-{g.pipeline}")
def test_no_placement_keeps_more(trainer: Grid, engine: Grid) -> None:
    weights = weight_map(SHAPE)
    held = overlap(weights, SHAPE.num_layers, trainer, engine)
    position = best_placement(held, ranks_per_node=8)
    assert sorted(position) == list(range(engine.world))
    assert kept(held, position) == best_by_trying_all(held)
    plan = build_plan(weights, SHAPE.num_layers, trainer, engine, position)
    assert plan.local.sum() == kept(held, position), "the plan keeps what the advisor promised"


@pytest.mark.parametrize("seed", range(20))
def test_no_placement_keeps_more_with_arbitrary_overlaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_shards = int(rng.choice([2, 3, 4]))
    num_ranks = num_shards * int(rng.integers(1, 8 // num_shards + 1))
    held = rng.integers(0, 6, (num_ranks, num_shards))
    assert kept(held, best_placement(held, ranks_per_node=num_ranks)) == best_by_trying_all(held)


def test_a_unit_makes_room_by_moving_two_others() -> None:
    # Greedy: 0 -> a (9), 1 -> b (8), 2 is left with c (0) = 17. Best: 2 -> a, 0 -> b, 1 -> c = 9 + 8 + 7 = 24.
    values = np.array([[9, 8, 0], [0, 8, 7], [9, 0, 0]])
    flow = most_valuable_flow(values, np.array([1, 1, 1]), 1)
    assert flow.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_the_example_of_the_documentation() -> None:
    grids = Grid(8, tensor=4, pipeline=2), Grid(8, tensor=2)
    position = best_placement(overlap(weight_map(SHAPE), SHAPE.num_layers, *grids), ranks_per_node=8)
    assert ranks_in_order(position) == (0, 2, 1, 3, 4, 6, 5, 7)


def test_the_usual_order_stays_where_nothing_is_better() -> None:
    for trainer, engine in ((Grid(8, tensor=2), Grid(8, tensor=2)), (Grid(8, tensor=4, pipeline=2), Grid(8))):
        held = overlap(weight_map(SHAPE), SHAPE.num_layers, trainer, engine)
        assert best_placement(held, ranks_per_node=8) == tuple(range(8))


def test_order_and_position_are_inverse() -> None:
    position = (2, 0, 3, 1)
    assert ranks_in_order(position) == (1, 3, 0, 2)  # rank 1 stands at place 0, rank 3 at place 1 ...


@pytest.mark.parametrize("ranks_per_node", [4, 8])
def test_replicas_stay_on_a_node(ranks_per_node: int) -> None:
    grids = Grid(16, tensor=4, pipeline=2), Grid(16, tensor=2)
    position = best_placement(overlap(weight_map(SHAPE), SHAPE.num_layers, *grids), ranks_per_node)
    for replica in np.reshape(ranks_in_order(position), (-1, 2)):
        assert len(set(replica // ranks_per_node)) == 1


def test_a_replica_larger_than_a_node_is_placed_over_the_world() -> None:
    grids = Grid(8, tensor=4, pipeline=2), Grid(8, tensor=4)
    held = overlap(weight_map(SHAPE), SHAPE.num_layers, *grids)
    assert kept(held, best_placement(held, ranks_per_node=2)) == best_by_trying_all(held)


def test_an_engine_on_ranks_of_its_own_keeps_the_usual_order() -> None:
    held = overlap(weight_map(SHAPE), SHAPE.num_layers, Grid(4, tensor=4), Grid(4, first_rank=4, tensor=2))
    assert held.shape == (4, 2) and not held.any()
    assert best_placement(held, ranks_per_node=8) == (0, 1, 2, 3)
