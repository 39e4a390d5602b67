# SPDX-License-Identifier: Apache-2.0
"""A grid's arithmetic against torch's view of the ranks, as Megatron-core and vLLM lay them out, and its rules."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.runtime.grid import Grid, GridCoord
from model_providers.shape import RopeSettings, TransformerShape

REPO = Path(__file__).parents[2]

SHAPE = TransformerShape(
    num_layers=12,
    hidden_size=96,
    ffn_hidden_size=40,
    num_heads=24,
    num_groups=6,
    head_dim=4,
    vocab_size=300,
    rms_eps=1e-6,
    rope=RopeSettings(1e4, dim=4),
    qkv_bias=False,
    tied_embeddings=False,
    max_positions=64,
)
MOE = replace(SHAPE, num_experts=6)

GRIDS = [
    Grid(1),
    Grid(8, tensor=2, pipeline=2, context=2),
    Grid(16, tensor=2, pipeline=2, context=2),
    Grid(24, tensor=2, pipeline=3, expert=2),
    Grid(16, first_rank=4, tensor=2, pipeline=2, expert=4, expert_tensor=2),
    Grid(8, first_rank=8, tensor=4),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_rank_has_the_place_of_megatrons_order(grid: Grid) -> None:
    ranks = grid.first_rank + torch.arange(grid.world)
    dense = ranks.view(grid.pipeline, -1, grid.context, grid.tensor)
    experts = ranks.view(grid.pipeline, -1, grid.expert, grid.expert_tensor)
    assert grid.data == dense.shape[1]
    for rank in grid.ranks:
        ((pp, dp, cp, tp),) = (dense == rank).nonzero().tolist()
        assert grid.coord(rank) == GridCoord(tp=tp, pp=pp, dp=dp, cp=cp)
        assert grid.slot(rank, is_expert=False) == (tp, grid.tensor)
        ((_, _, ep, etp),) = (experts == rank).nonzero().tolist()
        assert grid.slot(rank, is_expert=True) == (ep * grid.expert_tensor + etp, grid.expert * grid.expert_tensor)
        assert grid.expert_rank(rank) == ep
    for stage in range(grid.pipeline):
        for tp in range(grid.tensor):
            assert list(grid.ranks_of_slot(stage, tp, is_expert=False)) == dense[stage, :, :, tp].flatten().tolist()
        for slot in range(grid.num_slots(is_expert=True)):
            ep, etp = divmod(slot, grid.expert_tensor)
            assert list(grid.ranks_of_slot(stage, slot, is_expert=True)) == experts[stage, :, ep, etp].tolist()


def test_an_engines_replicas_are_consecutive_ranks() -> None:
    engine = Grid(6, first_rank=4, tensor=2)
    replicas = (4 + torch.arange(6)).view(3, 2)
    assert engine.data == 3
    for rank in engine.ranks:
        ((replica, tp),) = (replicas == rank).nonzero().tolist()
        assert (engine.coord(rank).dp, engine.coord(rank).tp) == (replica, tp)


def test_a_rank_of_another_grid_has_no_place() -> None:
    with pytest.raises(AssertionError, match="rank 3 is not one of"):
        Grid(2, first_rank=4).coord(3)


def test_layers_go_round_the_stages_in_chunks() -> None:
    assert [Grid(4, pipeline=4).stage_of_layer(i, 8) for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [Grid(2, pipeline=2, virtual=2).stage_of_layer(i, 8) for i in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


RULES = [  # grid, shape, what is told
    (Grid(24, tensor=6, pipeline=4), MOE, []),
    (Grid(4, tensor=2, pipeline=2), SHAPE, []),
    (Grid(6, tensor=2, pipeline=2), SHAPE, ["p.tensor*pipeline=4: does not divide 6 ranks; use a divisor"]),
    (Grid(6, pipeline=2, expert=2), MOE, ["p.expert=2: does not divide 3 ranks of a stage; use a divisor"]),
    (Grid(4, expert=4), MOE, ["p.expert=4: does not divide 6 experts; use a divisor"]),
    (Grid(4, expert=2), SHAPE, ["p.expert=2: the model has no experts; use 1"]),
    (Grid(3, expert_tensor=3), MOE, ["p.expert_tensor=3: does not divide 40 feed-forward columns; use a divisor"]),
    (Grid(3, tensor=3), SHAPE, ["p.tensor=3: does not divide 40 feed-forward columns; use a divisor"]),
    (Grid(5, pipeline=5), SHAPE, ["p.pipeline=5: does not divide 12 layers; use a divisor"]),
    (Grid(3, pipeline=3, virtual=3), SHAPE, ["p.pipeline*chunks=9: does not divide 12 layers; use a divisor"]),
    (Grid(1, virtual=2), SHAPE, ["p.chunks=2: one pipeline stage has no virtual ones; use several stages, or 1"]),
    (Grid(4, tensor=4), SHAPE, ["p.tensor=4: neither divides nor is a multiple of 6 KV heads; change it"]),
    (Grid(12, tensor=12), MOE, []),  # a multiple of the KV heads: those are repeated
    (
        Grid(5, tensor=5),
        SHAPE,
        [
            "p.tensor=5: does not divide 24 attention heads; use a divisor",
            "p.tensor=5: neither divides nor is a multiple of 6 KV heads; change it",
            "p.tensor=5: does not divide 96 hidden units; use a divisor",
        ],
    ),
    (Grid(4, tensor=0, virtual=-1), SHAPE, ["p.tensor=0: must be at least 1", "p.chunks=-1: must be at least 1"]),
]


@pytest.mark.parametrize(("grid", "shape", "expected"), RULES, ids=lambda value: str(value)[:40])
def test_what_a_grid_cannot_be(grid: Grid, shape: TransformerShape, expected: list[str]) -> None:
    assert [problem.told("p.", {"virtual": "chunks"}, "*") for problem in grid.problems(shape)] == expected


def test_what_a_training_run_asks_for_in_addition() -> None:
    def told(grid: Grid, comm: str) -> list[str]:
        return [problem.told("", {}) for problem in grid.run_problems(SHAPE, comm)]

    assert told(Grid(3, pipeline=3, virtual=2), "a2a") == told(Grid(8, tensor=2, context=4), "a2a") == []
    assert told(Grid(2, pipeline=2, virtual=2), "p2p") == ["virtual=2: needs a pipeline of more than 2 stages; use 1"]
    assert told(Grid(10, tensor=2, context=5), "p2p") == []
    (heads,) = told(Grid(10, tensor=2, context=5), "a2a")
    assert heads.startswith("context_comm=a2a: 24 heads / tensor=2 do not divide over context=5 ranks; use all_gather")


def test_what_an_engine_cannot_be() -> None:
    def told(tensor: int, shape: TransformerShape) -> list[str]:
        return [problem.told("", {}) for problem in Grid(tensor, tensor=tensor).engine_problems(shape)]

    assert told(2, SHAPE) == told(2, MOE) == []
    assert told(3, MOE) == told(3, SHAPE) == ["tensor=3: does not divide 40 feed-forward columns; use a divisor"]
    assert told(4, SHAPE) == ["tensor=4: neither divides nor is a multiple of 6 KV heads; change it"]


def test_a_grid_needs_no_torch() -> None:
    code = "import sys, megatron_rl.runtime.grid; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
