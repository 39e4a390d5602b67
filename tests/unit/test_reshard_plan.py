# SPDX-License-Identifier: Apache-2.0
"""The reshard plan over many layouts, checked element by element on small tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_rl.rollout.reshard_plan import Layouts, Move, ReshardPlan, make_plan, stage_of
from megatron_rl.rollout.resharder import Message, _rounds
from model_providers.qwen2_5_vl.weights import weight_map
from model_providers.transformer import TransformerShape
from model_providers.weight_map import Block, Shard, WeightMap

SHAPE = TransformerShape(
    num_layers=4,
    hidden_size=12,
    ffn_hidden_size=24,
    num_heads=6,
    num_groups=3,
    head_dim=2,
    vocab_size=380,  # padded to 384: vLLM, too, wants padded rows that its ranks divide
    rms_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 0, 0),
    qkv_bias=True,
    tied_embeddings=False,
    max_positions=64,
)
FEW_KV_HEADS = replace(SHAPE, hidden_size=16, num_heads=8, num_groups=2, vocab_size=300)
TIED = replace(FEW_KV_HEADS, tied_embeddings=True)

# (shape, trainer tp, trainer pp, trainer cp, data parallel, engine tp)
LAYOUTS = [
    (SHAPE, 1, 1, 1, 1, 1),
    (SHAPE, 3, 1, 1, 1, 3),
    (SHAPE, 3, 1, 1, 1, 1),
    (SHAPE, 3, 2, 1, 1, 2 * 3),
    (SHAPE, 2, 1, 1, 3, 3),
    (SHAPE, 1, 2, 3, 1, 3),
    (SHAPE, 1, 4, 1, 1, 1),
    (FEW_KV_HEADS, 4, 1, 1, 1, 4),
    (FEW_KV_HEADS, 4, 2, 1, 1, 8),
    (FEW_KV_HEADS, 8, 1, 1, 1, 2),
    (FEW_KV_HEADS, 1, 2, 2, 2, 4),
    (FEW_KV_HEADS, 2, 2, 1, 2, 1),
    (TIED, 2, 2, 1, 1, 2),
    (TIED, 4, 1, 1, 1, 2),
    (TIED, 1, 4, 1, 2, 8),
]


def layouts_of(tensor: int, pipeline: int, context: int, data: int, rollout_tensor: int) -> Layouts:
    return Layouts(tensor * pipeline * context * data, tensor, pipeline, context, rollout_tensor)


def plan_of(case: tuple[TransformerShape, int, int, int, int, int]) -> tuple[ReshardPlan, WeightMap, Layouts]:
    shape, *sizes = case
    weights, layouts = weight_map(shape), layouts_of(*sizes)
    return make_plan(weights, shape.num_layers, layouts), weights, layouts


def elements(block: Block) -> Iterator[tuple[str, int, int]]:
    for row, col in itertools.product(range(*block.rows), range(*block.cols)):
        yield block.hf, row, col


def held_by_trainer(weights: WeightMap, layouts: Layouts, num_layers: int, rank: int) -> dict[str, Shard]:
    """Shards of one rank by hand: its stage's layers, the embedding first, final norm and head last."""
    per_stage = num_layers // layouts.pipeline
    stage = rank // (layouts.world // layouts.pipeline)
    held = {}
    for name, entry in weights.entries.items():
        if name.startswith("decoder.layers."):
            mine = int(name.split(".")[2]) // per_stage == stage
        elif name.startswith("embedding"):
            mine = stage == 0
        else:
            mine = stage == layouts.pipeline - 1
        if mine:
            held[name] = entry.layout.trainer(entry.hf, rank % layouts.tensor, layouts.tensor)
    return held


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: f"{c[0].num_groups}kv-" + "-".join(map(str, c[1:])))
def test_every_needed_element_arrives_once_from_a_rank_that_holds_it(case) -> None:
    plan, weights, layouts = plan_of(case)
    for rank in range(layouts.world):
        held = held_by_trainer(weights, layouts, case[0].num_layers, rank)
        own = {e for shard in held.values() for block in shard.blocks for e in elements(block)}
        arriving: Counter[tuple[str, str, int, int]] = Counter()
        for move in plan.moves:
            assert (move.source.hf, move.source.rows, move.source.cols) == (
                move.target.hf,
                move.target.rows,
                move.target.cols,
            )
            if move.sender == rank:
                assert any(lies_in(move.source, b) for b in held[move.mcore].blocks)
            if move.receiver == rank:
                arriving.update((move.engine, *e) for e in elements(move.target))
                if move.sender != rank:
                    assert own.isdisjoint(elements(move.target)), "sent what the receiver already holds"
        needed: Counter[tuple[str, str, int, int]] = Counter()
        for name, entry in weights.engine_entries().items():
            shard = entry.layout.engine(entry.hf, layouts.engine_tp(rank), layouts.rollout_tensor)
            needed.update((name, *e) for block in shard.blocks for e in elements(block))
        assert arriving == needed
        assert plan.needed[rank] == needed.total() == plan.received(rank) + plan.local(rank)


def lies_in(piece: Block, held: Block) -> bool:
    """The same elements at the same place of the local tensor."""
    return (
        piece.hf == held.hf
        and held.rows[0] <= piece.rows[0] < piece.rows[1] <= held.rows[1]
        and held.cols[0] <= piece.cols[0] < piece.cols[1] <= held.cols[1]
        and piece.at == (held.at[0] + piece.rows[0] - held.rows[0], held.at[1] + piece.cols[0] - held.cols[0])
    )


def test_same_layout_on_both_sides_moves_nothing() -> None:
    plan, _, _ = plan_of((replace(FEW_KV_HEADS, vocab_size=256), 2, 1, 1, 2, 2))
    # Only the interleaving of q, k and v inside a rank differs, and that is a local copy.
    assert [plan.received(rank) for rank in range(4)] == [0] * 4
    assert all(plan.local(rank) == plan.needed[rank] for rank in range(4))


def test_equal_owners_share_the_sending() -> None:
    plan, _, layouts = plan_of((FEW_KV_HEADS, 1, 2, 1, 4, 1))  # 4 ranks hold each stage, 4 others want it
    sent = [plan.sent(rank) for rank in range(layouts.world)]
    assert sum(sent) == sum(plan.received(rank) for rank in range(layouts.world)) > 0
    for stage in (sent[:4], sent[4:]):
        largest = max(m.source.numel for m in plan.moves)
        assert max(stage) - min(stage) <= largest, f"unbalanced: {stage}"


def test_tied_embedding_comes_from_the_stage_that_needs_no_message() -> None:
    plan, _, _ = plan_of((TIED, 1, 2, 1, 1, 1))
    moves = [m for m in plan.moves if "embed_tokens" in m.engine]
    assert {(m.receiver, m.sender, m.mcore) for m in moves} == {
        (0, 0, "embedding.word_embeddings.weight"),
        (1, 1, "output_layer.weight"),
    }


def test_stages_of_parameters() -> None:
    assert stage_of("embedding.word_embeddings.weight", 8, 4) == 0
    assert [stage_of(f"decoder.layers.{i}.mlp.linear_fc1.weight", 8, 4) for i in (0, 1, 2, 7)] == [0, 0, 1, 3]
    assert stage_of("decoder.final_layernorm.weight", 8, 4) == stage_of("output_layer.weight", 8, 4) == 3


@pytest.mark.parametrize("max_numel", [1, 100, 1000, 10**9])
def test_rounds_are_bounded_and_complete(max_numel: int) -> None:
    plan, _, layouts = plan_of((FEW_KV_HEADS, 2, 2, 1, 1, 4))
    per_rank = [list(_rounds(plan, rank, max_numel)) for rank in range(layouts.world)]
    assert len({len(rounds) for rounds in per_rank}) == 1, "both ends of a message must agree on the round"
    assert len(per_rank[0]) == 1 or max_numel < 10**9
    moved: list[Move] = []
    for turn in zip(*per_rank, strict=True):
        for rank, (sends, receives) in enumerate(turn):
            for messages in (sends, receives):
                assert within(messages, max_numel)
                assert len({m.peer for m in messages}) == len(messages), "two messages between one pair could swap"
            for message in receives:
                [mirror] = [m for m in turn[message.peer][0] if m.peer == rank]
                assert mirror.moves == message.moves
                moved += message.moves
    assert Counter(moved) == Counter(m for m in plan.moves if m.sender != m.receiver)


def within(messages: list[Message], max_numel: int) -> bool:
    """A single piece may be larger than the bound; then it is alone."""
    total = sum(m.numel for m in messages)
    return total <= max_numel or sum(len(m.moves) for m in messages) == 1


def test_plan_of_a_large_world_is_quick_and_exact() -> None:
    shape = replace(SHAPE, num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_heads=28, num_groups=4)
    shape = replace(shape, head_dim=128, vocab_size=152064)
    layouts = layouts_of(4, 2, 1, 2, 4)
    plan = make_plan(weight_map(shape), shape.num_layers, layouts)
    per_tensor = [entry.layout.engine(entry.hf, 0, 4) for entry in weight_map(shape).engine_entries().values()]
    numel = sum(int(torch.Size(shard.shape).numel()) for shard in per_tensor)
    assert set(plan.needed) == {numel}
    assert all(plan.received(r) + plan.local(r) == numel for r in range(layouts.world))
