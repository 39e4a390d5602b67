# SPDX-License-Identifier: Apache-2.0
"""The reshard plan over many layouts, checked element by element on small tensors."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.weight_sync.plan import Layouts, ReshardPlan, make_plan, stage_of
from megatron_rl.weight_sync.resharder import Part, Script, write_script
from model_providers.qwen2_5_vl.weights import weight_map
from model_providers.shape import RopeSettings, TransformerShape
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
    rope=RopeSettings(1e4, 2),
    qkv_bias=True,
    tied_embeddings=False,
    max_positions=64,
)
FEW_KV_HEADS = replace(SHAPE, hidden_size=16, num_heads=8, num_groups=2, vocab_size=300)
TIED = replace(FEW_KV_HEADS, tied_embeddings=True)
SIX = replace(SHAPE, num_layers=6, num_groups=6)

LAYOUTS = [
    (SHAPE, Layouts(1)),
    (SHAPE, Layouts(3, tensor=3, rollout_tensor=3)),
    (SHAPE, Layouts(3, tensor=3, rollout_tensor=1)),
    (SHAPE, Layouts(6, tensor=3, pipeline=2, rollout_tensor=6)),
    (SHAPE, Layouts(6, tensor=2, rollout_tensor=3)),
    (SHAPE, Layouts(6, pipeline=2, context=3, rollout_tensor=3)),
    (SHAPE, Layouts(4, pipeline=4)),
    (SHAPE, Layouts(4, pipeline=2, virtual=2, rollout_tensor=2)),
    (SHAPE, Layouts(6, tensor=3, pipeline=2, rollout_tensor=3, engine_position=(5, 3, 1, 0, 2, 4))),
    (FEW_KV_HEADS, Layouts(4, tensor=4, rollout_tensor=4)),
    (FEW_KV_HEADS, Layouts(8, tensor=4, pipeline=2, rollout_tensor=8)),
    (FEW_KV_HEADS, Layouts(8, tensor=8, rollout_tensor=2)),
    (FEW_KV_HEADS, Layouts(8, pipeline=2, context=2, rollout_tensor=4)),
    (FEW_KV_HEADS, Layouts(8, tensor=2, pipeline=2, rollout_tensor=1)),
    (TIED, Layouts(4, tensor=2, pipeline=2, rollout_tensor=2)),
    (TIED, Layouts(4, tensor=4, rollout_tensor=2)),
    (TIED, Layouts(8, pipeline=4, rollout_tensor=8)),
    (TIED, Layouts(8, pipeline=2, context=2, rollout_tensor=1)),
    (TIED, Layouts(8, tensor=2, pipeline=2, virtual=2, rollout_tensor=4)),
    (SIX, Layouts(6, tensor=3, rollout_tensor=2)),
    (SIX, Layouts(6, tensor=3, pipeline=2, context=1, rollout_tensor=2)),
    (SIX, Layouts(6, tensor=2, pipeline=3, rollout_tensor=3)),
    (SIX, Layouts(12, tensor=2, pipeline=3, virtual=2, context=2, rollout_tensor=6)),
    (FEW_KV_HEADS, Layouts(4, tensor=4, rollout_tensor=1)),
    (FEW_KV_HEADS, Layouts(4, tensor=2, pipeline=2, rollout_tensor=4)),
]

Case = tuple[TransformerShape, Layouts]


def name_of(case: Case) -> str:
    shape, layouts = case
    sizes = (layouts.world, layouts.tensor, layouts.pipeline, layouts.virtual, layouts.rollout_tensor)
    return f"{shape.num_groups}kv-" + "-".join(map(str, sizes)) + "-tied" * shape.tied_embeddings


def plan_of(shape: TransformerShape, layouts: Layouts) -> tuple[ReshardPlan, WeightMap]:
    weights = weight_map(shape)
    return make_plan(weights, shape.num_layers, layouts), weights


def elements(block: Block) -> Iterator[tuple[str, int, int]]:
    for row, col in itertools.product(range(*block.rows), range(*block.cols)):
        yield block.hf, row, col


def held_by_trainer(weights: WeightMap, layouts: Layouts, num_layers: int, rank: int) -> dict[str, Shard]:
    """Shards of one rank by hand: layers dealt in chunks; embedding on the first stage, norm and head on the last."""
    per_chunk = num_layers // layouts.pipeline // layouts.virtual
    stage = rank // (layouts.world // layouts.pipeline)
    held = {}
    for name, entry in weights.entries.items():
        if name.startswith("decoder.layers."):
            mine = int(name.split(".")[2]) // per_chunk % layouts.pipeline == stage
        elif name.startswith("embedding"):
            mine = stage == 0
        else:
            mine = stage == layouts.pipeline - 1
        if mine:
            held[name] = entry.layout.trainer(entry.hf, rank % layouts.tensor, layouts.tensor)
    return held


def lies_in(piece: Block, held: Block) -> bool:
    """The same elements at the same place of the local tensor."""
    return (
        piece.hf == held.hf
        and held.rows[0] <= piece.rows[0] < piece.rows[1] <= held.rows[1]
        and held.cols[0] <= piece.cols[0] < piece.cols[1] <= held.cols[1]
        and piece.at == (held.at[0] + piece.rows[0] - held.rows[0], held.at[1] + piece.cols[0] - held.cols[0])
    )


def same_elements(a: Block, b: Block) -> bool:
    return (a.hf, a.rows, a.cols) == (b.hf, b.rows, b.cols)


@pytest.mark.parametrize("case", LAYOUTS, ids=name_of)
def test_every_needed_element_arrives_once_from_a_rank_that_holds_it(case: Case) -> None:
    shape, layouts = case
    plan, weights = plan_of(shape, layouts)
    held = [held_by_trainer(weights, layouts, shape.num_layers, rank) for rank in range(layouts.world)]
    own = [{e for s in shards.values() for b in s.blocks for e in elements(b)} for shards in held]
    arriving: list[Counter[tuple[str, str, int, int]]] = [Counter() for _ in range(layouts.world)]
    for piece in plan.pieces:
        inside = list(elements(piece.target))
        for rank in {*piece.senders.tolist(), *piece.local.tolist()}:
            name, source = piece.source_on(rank)
            assert same_elements(source, piece.target)
            assert any(lies_in(source, block) for block in held[rank][name].blocks)
        for rank in piece.receivers:
            assert own[rank].isdisjoint(inside), "sent what the receiver already holds"
        for rank in (*piece.receivers, *piece.local):
            arriving[rank].update((piece.engine, *e) for e in inside)
    for rank in range(layouts.world):
        needed: Counter[tuple[str, str, int, int]] = Counter()
        position = layouts.engine_position[rank] if layouts.engine_position else rank
        for name, entry in weights.engine_entries().items():
            shard = entry.layout.engine(entry.hf, position % layouts.rollout_tensor, layouts.rollout_tensor)
            needed.update((name, *e) for block in shard.blocks for e in elements(block))
        assert arriving[rank] == needed
        assert plan.needed[rank] == needed.total() == plan.received[rank] + plan.local[rank]


def test_same_layout_on_both_sides_moves_nothing() -> None:
    shape = replace(FEW_KV_HEADS, vocab_size=256)
    plan, _ = plan_of(shape, Layouts(4, tensor=2, rollout_tensor=2))
    # Only the interleaving of q, k and v inside a rank differs, and that is a local copy.
    assert not plan.received.any() and not plan.sent.any()
    assert (plan.local == plan.needed).all()


def test_equal_owners_share_the_sending() -> None:
    plan, _ = plan_of(FEW_KV_HEADS, Layouts(8, pipeline=2))  # 4 ranks hold each stage, 4 others want it
    assert plan.sent.sum() == plan.received.sum() > 0
    largest = max(piece.numel for piece in plan.pieces)
    for stage in (plan.sent[:4], plan.sent[4:]):
        assert stage.max() - stage.min() <= largest, f"unbalanced: {stage}"


def test_tied_embedding_comes_from_the_stage_that_needs_no_message() -> None:
    plan, _ = plan_of(TIED, Layouts(2, pipeline=2))
    pieces = [p for p in plan.pieces if "embed_tokens" in p.engine]
    assert all(p.local.tolist() == [0, 1] and not len(p.receivers) for p in pieces)
    assert {p.source_on(0)[0] for p in pieces} == {"embedding.word_embeddings.weight"}
    assert {p.source_on(1)[0] for p in pieces} == {"output_layer.weight"}


def test_stages_of_parameters() -> None:
    plain, looped = Layouts(4, pipeline=4), Layouts(2, pipeline=2, virtual=2)
    assert stage_of("embedding.word_embeddings.weight", 8, plain) == 0
    assert [stage_of(f"decoder.layers.{i}.mlp.linear_fc1.weight", 8, plain) for i in (0, 1, 2, 7)] == [0, 0, 1, 3]
    assert [stage_of(f"decoder.layers.{i}.mlp.linear_fc1.weight", 8, looped) for i in range(8)] == [0, 0, 1, 1] * 2
    assert stage_of("decoder.final_layernorm.weight", 8, plain) == stage_of("output_layer.weight", 8, plain) == 3


def test_frozen_parameters_leave_the_plan_and_the_counts() -> None:
    plan, _ = plan_of(FEW_KV_HEADS, Layouts(4, tensor=2, pipeline=2, rollout_tensor=1))
    frozen = frozenset({"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"})
    rest = plan.without(frozen)
    assert {p.engine for p in plan.pieces} - {p.engine for p in rest.pieces} == frozen
    assert (plan.needed - rest.needed == 2 * 300 * 16).all()
    assert (rest.needed == rest.local + rest.received).all()


# ---------------------------------------------------------------------------------------------- rounds of messages

WAYS = [
    (FEW_KV_HEADS, Layouts(4, tensor=2, pipeline=2, rollout_tensor=4)),
    (FEW_KV_HEADS, Layouts(8, pipeline=2)),
    (SHAPE, Layouts(6, tensor=2, rollout_tensor=3)),
]


def scripts_of(case: Case, buffer_numel: int, alone_numel: int) -> tuple[ReshardPlan, list[Script]]:
    plan, _ = plan_of(*case)
    world = case[1].world
    return plan, [write_script(plan, rank, buffer_numel, alone_numel) for rank in range(world)]


def blocks_between(scripts: list[Script], kind: str) -> dict[tuple[int, int], list[list[Part]]]:
    """(sender, receiver) -> the parts of each message in the order in which this end posts them."""
    posted = defaultdict(list)
    for rank, script in enumerate(scripts):
        for round_ in script.rounds:
            for message in getattr(round_, kind):
                pair = (rank, message.peer) if kind == "sends" else (message.peer, rank)
                posted[pair].append(list(message.parts))
    return posted


@pytest.mark.parametrize("case", WAYS, ids=name_of)
@pytest.mark.parametrize(("buffer_numel", "alone_numel"), [(1, 10**9), (500, 100), (5000, 1), (10**9, 10**9)])
def test_both_ends_post_the_same_messages_in_the_same_order(case: Case, buffer_numel: int, alone_numel: int) -> None:
    plan, scripts = scripts_of(case, buffer_numel, alone_numel)
    sent, received = blocks_between(scripts, "sends"), blocks_between(scripts, "receives")
    assert sent.keys() == received.keys()
    for pair, messages in sent.items():
        for out, into in zip(messages, received[pair], strict=True):
            assert all(same_elements(a.block, b.block) for a, b in zip(out, into, strict=True))
    per_rank = [sum(m.numel for r in s.rounds for m in r.receives) for s in scripts]
    assert per_rank == plan.received.tolist()
    assert [s.needed for s in scripts] == plan.needed.tolist() and [s.local for s in scripts] == plan.local.tolist()


@pytest.mark.parametrize("case", WAYS, ids=name_of)
@pytest.mark.parametrize("buffer_numel", [1, 500, 5000])
def test_no_rank_waits_for_ever(case: Case, buffer_numel: int) -> None:
    """Each rank waits for all messages of its round; every message needs both ends to be in their rounds."""
    _, scripts = scripts_of(case, buffer_numel, 10**9)
    position = [0] * len(scripts)
    posted: dict[str, Counter[tuple[int, int]]] = {"sends": Counter(), "receives": Counter()}

    def ends(rank: int, kind: str, number: int) -> list[tuple[int, int]]:
        messages = getattr(scripts[rank].rounds[number], kind)
        return [(rank, m.peer) if kind == "sends" else (m.peer, rank) for m in messages]

    def post(rank: int) -> None:
        if position[rank] < len(scripts[rank].rounds):
            for kind in posted:
                posted[kind].update(ends(rank, kind, position[rank]))

    def is_done(rank: int) -> bool:
        """Its own posts are all in its rounds so far, so it is done when the other ends have posted as many."""
        if position[rank] == len(scripts[rank].rounds):
            return False
        pairs = [(kind, pair) for kind in posted for pair in ends(rank, kind, position[rank])]
        other = {"sends": "receives", "receives": "sends"}
        return all(posted[other[kind]][pair] >= posted[kind][pair] for kind, pair in pairs)

    for rank in range(len(scripts)):
        post(rank)
    while ready := [rank for rank in range(len(scripts)) if is_done(rank)]:
        for rank in ready:
            position[rank] += 1
            post(rank)
    assert position == [len(script.rounds) for script in scripts]


@pytest.mark.parametrize("case", WAYS, ids=name_of)
def test_staging_is_bounded(case: Case) -> None:
    _, scripts = scripts_of(case, 500, 100)
    staged = [sum(m.numel for m in (*r.sends, *r.receives)) for s in scripts for r in s.rounds]
    assert max(staged) <= 500 and len(staged) > 4 * len(scripts)


def filled(shard: Shard, full: Mapping[str, np.ndarray]) -> np.ndarray:
    """A local tensor of element numbers; 0 where padding lies."""
    shape = shard.shape if len(shard.shape) == 2 else (shard.shape[0], 1)
    local = np.zeros(shape, np.int64)
    for block in shard.blocks:
        local[block.local_slices] = full[block.hf][block.hf_slices]
    return local


def numbered(weights: WeightMap) -> dict[str, np.ndarray]:
    """HF tensors in which every element has a number of its own, from 1."""
    first, full = 1, {}
    for tensor in weights.hf_tensors().values():
        count = tensor.rows * tensor.cols
        full[tensor.name] = np.arange(first, first + count).reshape(tensor.rows, tensor.cols)
        first += count
    return full


def executed(case: Case, scripts: list[Script]) -> list[dict[str, np.ndarray]]:
    """Every rank's engine parameters after the scripts ran on element numbers: one queue for each pair of ranks."""
    (shape, layouts), weights = case, weight_map(case[0])
    full = numbered(weights)
    source = [
        {name: filled(s, full) for name, s in held_by_trainer(weights, layouts, shape.num_layers, rank).items()}
        for rank in range(layouts.world)
    ]
    target = [
        {
            name: np.zeros_like(filled(e.layout.engine(e.hf, layouts.engine_tp(rank), layouts.rollout_tensor), full))
            for name, e in weights.engine_entries().items()
        }
        for rank in range(layouts.world)
    ]
    queues: dict[tuple[int, int], deque[np.ndarray]] = defaultdict(deque)
    for rank, script in enumerate(scripts):
        for read, write in script.copies:
            target[rank][write.name][write.block.local_slices] = source[rank][read.name][read.block.local_slices]
        for message in (m for r in script.rounds for m in r.sends):
            parts = [source[rank][p.name][p.block.local_slices].ravel() for p in message.parts]
            queues[rank, message.peer].append(np.concatenate(parts))
    for rank, script in enumerate(scripts):
        for message in (m for r in script.rounds for m in r.receives):
            flat = queues[message.peer, rank].popleft()
            ends = np.cumsum([p.block.numel for p in message.parts])
            for part, values in zip(message.parts, np.split(flat, ends[:-1]), strict=True):
                target[rank][part.name][part.block.local_slices] = values.reshape(part.block.shape)
    assert not any(queues.values()), "a message that nobody receives"
    return target


@pytest.mark.parametrize("case", [*WAYS, (TIED, Layouts(8, tensor=2, pipeline=2, rollout_tensor=4))], ids=name_of)
@pytest.mark.parametrize(("buffer_numel", "alone_numel"), [(1, 10**9), (500, 100), (10**9, 1), (10**9, 10**9)])
def test_the_content_does_not_depend_on_the_buffer(case: Case, buffer_numel: int, alone_numel: int) -> None:
    _, scripts = scripts_of(case, buffer_numel, alone_numel)
    weights, layouts = weight_map(case[0]), case[1]
    full = numbered(weights)
    for rank, parameters in enumerate(executed(case, scripts)):
        for name, entry in weights.engine_entries().items():
            shard = entry.layout.engine(entry.hf, layouts.engine_tp(rank), layouts.rollout_tensor)
            np.testing.assert_array_equal(parameters[name], filled(shard, full), err_msg=f"rank {rank} {name}")


def test_large_pieces_travel_alone() -> None:
    _, scripts = scripts_of(WAYS[0], 10**9, 100)
    messages = [m for s in scripts for r in s.rounds for m in r.sends]
    assert any(len(m.parts) > 1 for m in messages)
    assert all(len(m.parts) == 1 or max(p.block.numel for p in m.parts) < 100 for m in messages)


def test_plan_of_a_large_world_is_quick_and_exact() -> None:
    shape = replace(SHAPE, num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_heads=28, num_groups=4)
    shape = replace(shape, head_dim=128, vocab_size=152064)
    plan, weights = plan_of(shape, Layouts(512, tensor=4, pipeline=2, rollout_tensor=4))
    entries = weights.engine_entries().values()
    numel = sum(int(np.prod(entry.layout.engine(entry.hf, 0, 4).shape)) for entry in entries)
    assert (plan.needed == numel).all()
    assert (plan.received + plan.local == numel).all()
