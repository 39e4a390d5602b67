# SPDX-License-Identifier: Apache-2.0
"""Experts in the weight table: every element of every expert once on either side, and their names.

Cutting one expert over several trainer ranks (`expert_tensor` > 1) is on plan level only: no trainer of ours does it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import build_plan
from model_providers.decoder_weights import decoder_weight_map
from model_providers.shape import RopeSettings, TransformerShape
from model_providers.weight_map import HfTensor, Shard, WeightMap, canonical_name

SHAPE = TransformerShape(
    num_layers=2,
    hidden_size=6,
    ffn_hidden_size=8,
    num_heads=4,
    num_groups=2,
    head_dim=4,
    vocab_size=20,
    rms_eps=1e-6,
    rope=RopeSettings(1e4, 2),
    qkv_bias=False,
    tied_embeddings=False,
    max_positions=64,
    qk_norm=True,
    num_experts=4,
    experts_per_token=2,
)
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (2, 4)]  # expert parallel, tensor parallel within an expert
EXPERT = "decoder.layers.1.mlp.experts.{}.linear_fc{}.weight"


def full_tensor(hf: HfTensor) -> torch.Tensor:
    """Elements that say which tensor, row and column they are."""
    seed = sum(map(ord, hf.name)) * 10_000 + int("".join(filter(str.isdigit, hf.name)) or 0) * 1_000_000
    return seed + torch.arange(hf.rows * hf.cols).view(hf.rows, hf.cols)


def filled(shard: Shard, weights: WeightMap) -> torch.Tensor:
    """The shard as a matrix, -1 where no block lies."""
    matrix = torch.full(shard.shape if len(shard.shape) > 1 else (*shard.shape, 1), -1).flatten(0, -2)
    for block in shard.blocks:
        assert bool((matrix[block.local_slices] == -1).all()), "blocks overlap"
        matrix[block.local_slices] = full_tensor(weights.hf_tensors()[block.hf])[block.hf_slices]
    return matrix


@pytest.mark.parametrize(("expert", "expert_tensor"), GRIDS)
def test_the_trainer_holds_every_expert_once(expert: int, expert_tensor: int) -> None:
    weights = decoder_weight_map(SHAPE, expert_tensor=expert_tensor)
    for index in range(4):
        gate_up, down = (weights[EXPERT.format(index, fc)] for fc in (1, 2))
        gate, up, whole_down = (full_tensor(t) for t in (*gate_up.hf, *down.hf))
        for slot in range(expert * expert_tensor):
            ep_rank, tensor_rank = divmod(slot, expert_tensor)
            first, second = (e.layout.trainer(e.hf, slot, expert * expert_tensor) for e in (gate_up, down))
            if index // (4 // expert) != ep_rank:
                assert first.blocks == second.blocks == ()
                continue
            mine = torch.cat([t.chunk(expert_tensor)[tensor_rank] for t in (gate, up)])
            assert torch.equal(filled(first, weights), mine)
            assert torch.equal(filled(second, weights), whole_down.chunk(expert_tensor, dim=1)[tensor_rank])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_engine_stacks_all_experts(world: int) -> None:
    weights = decoder_weight_map(SHAPE)
    for rank in range(world):
        w13, w2 = [], []
        stacked = {fc: torch.full((4 * rows, cols), -1) for fc, rows, cols in ((1, 16 // world, 6), (2, 6, 8 // world))}
        for index in range(4):
            gate_up, down = (weights[EXPERT.format(index, fc)] for fc in (1, 2))
            w13.append(torch.cat([full_tensor(t).chunk(world)[rank] for t in gate_up.hf]))
            w2.append(full_tensor(down.hf[0]).chunk(world, dim=1)[rank])
            for fc, entry in ((1, gate_up), (2, down)):
                shard = entry.layout.engine(entry.hf, rank, world)
                assert shard.shape == ((4, 16 // world, 6) if fc == 1 else (4, 6, 8 // world))
                part = filled(shard, weights)
                assert bool(((part == -1) | (stacked[fc] == -1)).all()), "experts overlap"
                stacked[fc] = torch.maximum(stacked[fc], part)
        assert torch.equal(stacked[1], torch.cat(w13)) and torch.equal(stacked[2], torch.cat(w2))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("expert", "expert_tensor"), GRIDS)
@pytest.mark.parametrize(("tensor", "pipeline", "rollout"), [(1, 1, 2), (2, 1, 4), (2, 2, 1)])
def test_a_plan_brings_every_element_to_every_engine_rank(
    expert: int, expert_tensor: int, tensor: int, pipeline: int, rollout: int, tied: bool
) -> None:
    weights = decoder_weight_map(replace(SHAPE, tied_embeddings=tied), expert_tensor=expert_tensor)
    grid = Grid(16, tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
    plan = build_plan(weights, SHAPE.num_layers, grid, Grid(16, tensor=rollout))
    got = [dict.fromkeys(weights.engine_entries(), 0) for _ in range(16)]
    for transfer in plan.transfers:
        for rank in itertools.chain(transfer.local, transfer.receivers):
            got[rank][transfer.engine] += transfer.numel
        for sender in {*transfer.senders.tolist(), *transfer.local.tolist()}:
            mcore, block = transfer.source_on(sender)
            slot = sender % (16 // pipeline) % (expert * expert_tensor if weights[mcore].layout.is_expert else tensor)
            world = grid.num_slots(weights[mcore].layout.is_expert)
            shard = weights[mcore].layout.trainer(weights[mcore].hf, slot, world)
            held = filled(shard, weights)[block.local_slices]
            assert torch.equal(held, full_tensor(weights.hf_tensors()[block.hf])[block.hf_slices])
    for rank in range(16):
        for name, entry in weights.engine_entries().items():
            parts = [e for e in weights.entries.values() if e.engine == name]
            distinct = {e.hf: e for e in parts}.values()
            blocks = [b for e in distinct for b in e.layout.engine(e.hf, rank % rollout, rollout).blocks]
            assert got[rank][name] == sum(b.numel for b in blocks), (rank, name, entry.layout)
    assert np.array_equal(plan.local + plan.received, plan.needed)


def test_names_of_sequential_and_grouped_experts_agree() -> None:
    table = "decoder.layers.5.mlp.experts.{}.linear_fc{}.weight"
    for local, fc in itertools.product((0, 3), (1, 2)):
        sequential = f"decoder.layers.1.mlp.experts.local_experts.{local}.linear_fc{fc}.weight"
        grouped = f"decoder.layers.1.mlp.experts.linear_fc{fc}.weight{local}"
        for name in (sequential, grouped):
            assert canonical_name(name, 4, expert_offset=8) == table.format(local + 8, fc)
    assert canonical_name("decoder.layers.0.mlp.router.weight", 1, 8) == "decoder.layers.1.mlp.router.weight"


def test_table_holds_the_names_of_published_checkpoints() -> None:
    names = set(decoder_weight_map(SHAPE).hf_tensors())
    attention = [f"self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    experts = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")]
    layer = [*attention, *experts, "mlp.gate.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == outside | {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
