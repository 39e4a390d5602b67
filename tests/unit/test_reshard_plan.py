# SPDX-License-Identifier: Apache-2.0
"""The reshard plan over many layouts, checked element by element on small tensors."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import ReshardPlan, build_plan, stage_of
from megatron_rl.weight_sync.resharder import Part, Script, build_script
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
    (SHAPE, Grid(1), Grid(1)),
    (SHAPE, Grid(3, tensor=3), Grid(3, tensor=3)),
    (SHAPE, Grid(3, tensor=3), Grid(3)),
    (SHAPE, Grid(6, tensor=3, pipeline=2), Grid(6, tensor=6)),
    (SHAPE, Grid(6, tensor=2), Grid(6, tensor=3)),
    (SHAPE, Grid(6, pipeline=2, context=3), Grid(6, tensor=3)),
    (SHAPE, Grid(4, pipeline=4), Grid(4)),
    (SHAPE, Grid(4, pipeline=2, virtual=2), Grid(4, tensor=2)),
    (SHAPE, Grid(6, tensor=3, pipeline=2), Grid(6, tensor=3), (5, 3, 1, 0, 2, 4)),
    (FEW_KV_HEADS, Grid(4, tensor=4), Grid(4, tensor=4)),
    (FEW_KV_HEADS, Grid(8, tensor=4, pipeline=2), Grid(8, tensor=8)),
    (FEW_KV_HEADS, Grid(8, tensor=8), Grid(8, tensor=2)),
    (FEW_KV_HEADS, Grid(8, pipeline=2, context=2), Grid(8, tensor=4)),
    (FEW_KV_HEADS, Grid(8, tensor=2, pipeline=2), Grid(8)),
    (TIED, Grid(4, tensor=2, pipeline=2), Grid(4, tensor=2)),
    (TIED, Grid(4, tensor=4), Grid(4, tensor=2)),
    (TIED, Grid(8, pipeline=4), Grid(8, tensor=8)),
    (TIED, Grid(8, pipeline=2, context=2), Grid(8)),
    (TIED, Grid(8, tensor=2, pipeline=2, virtual=2), Grid(8, tensor=4)),
    (SIX, Grid(6, tensor=3), Grid(6, tensor=2)),
    (SIX, Grid(6, tensor=3, pipeline=2), Grid(6, tensor=2)),
    (SIX, Grid(6, tensor=2, pipeline=3), Grid(6, tensor=3)),
    (SIX, Grid(12, tensor=2, pipeline=3, virtual=2, context=2), Grid(12, tensor=6)),
    (FEW_KV_HEADS, Grid(4, tensor=4), Grid(4)),
    (FEW_KV_HEADS, Grid(4, tensor=2, pipeline=2), Grid(4, tensor=4)),
    (FEW_KV_HEADS, Grid(4, tensor=2, pipeline=2), Grid(4, first_rank=4, tensor=2)),  # from here on, ranks of its own
    (SIX, Grid(3, pipeline=3), Grid(4, first_rank=3, tensor=2), (2, 1, 0, 3)),
    (TIED, Grid(4, tensor=4), Grid(2, first_rank=4)),
    (TIED, Grid(2, first_rank=4, pipeline=2), Grid(4, tensor=4)),  # the engine's come first
    (FEW_KV_HEADS, Grid(4, tensor=4), Grid(4, first_rank=2, tensor=2)),  # two ranks are in both
]

Case = tuple[TransformerShape, Grid, Grid] | tuple[TransformerShape, Grid, Grid, tuple[int, ...]]


def name_of(case: Case) -> str:
    shape, trainer, engine, *_ = case
    sizes = (plan_world(case), trainer.tensor, trainer.pipeline, trainer.virtual, engine.tensor, engine.first_rank)
    return f"{shape.num_groups}kv-" + "-".join(map(str, sizes)) + "-tied" * shape.tied_embeddings


def plan_world(case: Case) -> int:
    return max(grid.first_rank + grid.world for grid in case[1:3])


def plan_of(
    shape: TransformerShape, trainer: Grid, engine: Grid, position: tuple[int, ...] = ()
) -> tuple[ReshardPlan, WeightMap]:
    weights = weight_map(shape)
    return build_plan(weights, shape.num_layers, trainer, engine, position), weights


def engine_shard(case: Case, rank: int) -> int | None:
    """Engine ranks take turns over the shards; None for a rank without an engine."""
    _, _, engine, *rest = case
    index = rank - engine.first_rank
    if not 0 <= index < engine.world:
        return None
    return (rest[0][index] if rest else index) % engine.tensor


def elements(block: Block) -> Iterator[tuple[str, int, int]]:
    for row, col in itertools.product(range(*block.rows), range(*block.cols)):
        yield block.hf, row, col


def held_by_trainer(weights: WeightMap, trainer: Grid, num_layers: int, rank: int) -> dict[str, Shard]:
    """Shards of one rank by hand: layers dealt in chunks; embedding on the first stage, norm and head on the last."""
    per_chunk = num_layers // trainer.pipeline // trainer.virtual
    place = rank - trainer.first_rank
    stage = place // (trainer.world // trainer.pipeline)
    held: dict[str, Shard] = {}
    if not 0 <= place < trainer.world:
        return held
    for name, entry in weights.entries.items():
        if name.startswith("decoder.layers."):
            mine = int(name.split(".")[2]) // per_chunk % trainer.pipeline == stage
        elif name.startswith("embedding"):
            mine = stage == 0
        else:
            mine = stage == trainer.pipeline - 1
        if mine:
            held[name] = entry.layout.trainer(entry.hf, place % trainer.tensor, trainer.tensor)
    return held


def lies_in(part: Block, held: Block) -> bool:
    """The same elements at the same place of the local tensor."""
    return (
        part.hf == held.hf
        and held.rows[0] <= part.rows[0] < part.rows[1] <= held.rows[1]
        and held.cols[0] <= part.cols[0] < part.cols[1] <= held.cols[1]
        and part.at == (held.at[0] + part.rows[0] - held.rows[0], held.at[1] + part.cols[0] - held.cols[0])
    )


def same_elements(a: Block, b: Block) -> bool:
    return (a.hf, a.rows, a.cols) == (b.hf, b.rows, b.cols)


@pytest.mark.parametrize("case", LAYOUTS, ids=name_of)
def test_every_needed_element_arrives_once_from_a_rank_that_holds_it(case: Case) -> None:
    shape, trainer, engine, *_ = case
    plan, weights = plan_of(*case)
    held = [held_by_trainer(weights, trainer, shape.num_layers, rank) for rank in range(plan_world(case))]
    own = [{e for s in shards.values() for b in s.blocks for e in elements(b)} for shards in held]
    arriving: list[Counter[tuple[str, str, int, int]]] = [Counter() for _ in held]
    for transfer in plan.transfers:
        inside = list(elements(transfer.target))
        for rank in {*transfer.senders.tolist(), *transfer.local.tolist()}:
            name, source = transfer.source_on(rank)
            assert same_elements(source, transfer.target)
            assert any(lies_in(source, block) for block in held[rank][name].blocks)
        for rank in transfer.receivers:
            assert own[rank].isdisjoint(inside), "sent what the receiver already holds"
        for rank in (*transfer.receivers, *transfer.local):
            arriving[rank].update((transfer.engine, *e) for e in inside)
    for rank in range(plan_world(case)):
        needed: Counter[tuple[str, str, int, int]] = Counter()
        tp = engine_shard(case, rank)
        for name, entry in weights.engine_entries().items() if tp is not None else ():
            shard = entry.layout.engine(entry.hf, tp, engine.tensor)
            needed.update((name, *e) for block in shard.blocks for e in elements(block))
        assert arriving[rank] == needed
        assert plan.needed[rank] == needed.total() == plan.received[rank] + plan.local[rank]


def test_same_layout_on_both_sides_moves_nothing() -> None:
    shape = replace(FEW_KV_HEADS, vocab_size=256)
    plan, _ = plan_of(shape, Grid(4, tensor=2), Grid(4, tensor=2))
    # Only the interleaving of q, k and v inside a rank differs, and that is a local copy.
    assert not plan.received.any() and not plan.sent.any()
    assert (plan.local == plan.needed).all()


def test_equal_owners_share_the_sending() -> None:
    plan, _ = plan_of(FEW_KV_HEADS, Grid(8, pipeline=2), Grid(8))  # 4 ranks hold each stage, 4 others want it
    assert plan.sent.sum() == plan.received.sum() > 0
    largest = max(transfer.numel for transfer in plan.transfers)
    for stage in (plan.sent[:4], plan.sent[4:]):
        assert stage.max() - stage.min() <= largest, f"unbalanced: {stage}"


def test_tied_embedding_comes_from_the_stage_that_needs_no_message() -> None:
    plan, _ = plan_of(TIED, Grid(2, pipeline=2), Grid(2))
    transfers = [t for t in plan.transfers if "embed_tokens" in t.engine]
    assert all(t.local.tolist() == [0, 1] and not len(t.receivers) for t in transfers)
    assert {t.source_on(0)[0] for t in transfers} == {"embedding.word_embeddings.weight"}
    assert {t.source_on(1)[0] for t in transfers} == {"output_layer.weight"}


def test_stages_of_parameters() -> None:
    plain, looped = Grid(4, pipeline=4), Grid(2, pipeline=2, virtual=2)
    assert stage_of("embedding.word_embeddings.weight", 8, plain) == 0
    assert [stage_of(f"decoder.layers.{i}.mlp.linear_fc1.weight", 8, plain) for i in (0, 1, 2, 7)] == [0, 0, 1, 3]
    assert [stage_of(f"decoder.layers.{i}.mlp.linear_fc1.weight", 8, looped) for i in range(8)] == [0, 0, 1, 1] * 2
    assert stage_of("decoder.final_layernorm.weight", 8, plain) == stage_of("output_layer.weight", 8, plain) == 3


def test_frozen_parameters_leave_the_plan_and_the_counts() -> None:
    plan, _ = plan_of(FEW_KV_HEADS, Grid(4, tensor=2, pipeline=2), Grid(4))
    frozen = frozenset({"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"})
    rest = plan.without(frozen)
    assert {t.engine for t in plan.transfers} - {t.engine for t in rest.transfers} == frozen
    assert (plan.needed - rest.needed == 2 * 300 * 16).all()
    assert (rest.needed == rest.local + rest.received).all()


# ---------------------------------------------------------------------------------------------- rounds of messages

WAYS = [
    (FEW_KV_HEADS, Grid(4, tensor=2, pipeline=2), Grid(4, tensor=4)),
    (FEW_KV_HEADS, Grid(8, pipeline=2), Grid(8)),
    (SHAPE, Grid(6, tensor=2), Grid(6, tensor=3)),
    (FEW_KV_HEADS, Grid(2, tensor=2), Grid(3, first_rank=2)),
]


def scripts_of(case: Case, buffer_numel: int, alone_numel: int) -> tuple[ReshardPlan, list[Script]]:
    plan, _ = plan_of(*case)
    return plan, [build_script(plan, rank, buffer_numel, alone_numel) for rank in range(plan_world(case))]


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
    (shape, trainer, engine, *_), weights = case, weight_map(case[0])
    full = numbered(weights)
    source = [
        {name: filled(s, full) for name, s in held_by_trainer(weights, trainer, shape.num_layers, rank).items()}
        for rank in range(plan_world(case))
    ]
    target = [
        {
            name: np.zeros_like(filled(e.layout.engine(e.hf, tp, engine.tensor), full))
            for name, e in weights.engine_entries().items()
            if (tp := engine_shard(case, rank)) is not None
        }
        for rank in range(plan_world(case))
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


@pytest.mark.parametrize("case", [*WAYS, (TIED, Grid(8, tensor=2, pipeline=2), Grid(8, tensor=4))], ids=name_of)
@pytest.mark.parametrize(("buffer_numel", "alone_numel"), [(1, 10**9), (500, 100), (10**9, 1), (10**9, 10**9)])
def test_the_content_does_not_depend_on_the_buffer(case: Case, buffer_numel: int, alone_numel: int) -> None:
    _, scripts = scripts_of(case, buffer_numel, alone_numel)
    weights, engine = weight_map(case[0]), case[2]
    full = numbered(weights)
    ranks = executed(case, scripts)
    assert sum(bool(parameters) for parameters in ranks) == engine.world
    for rank, parameters in enumerate(ranks):
        for name in parameters:
            entry, tp = weights.engine_entries()[name], engine_shard(case, rank)
            assert tp is not None
            shard = entry.layout.engine(entry.hf, tp, engine.tensor)
            np.testing.assert_array_equal(parameters[name], filled(shard, full), err_msg=f"rank {rank} {name}")


def test_large_rectangles_travel_alone() -> None:
    _, scripts = scripts_of(WAYS[0], 10**9, 100)
    messages = [m for s in scripts for r in s.rounds for m in r.sends]
    assert any(len(m.parts) > 1 for m in messages)
    assert all(len(m.parts) == 1 or max(p.block.numel for p in m.parts) < 100 for m in messages)


def test_plan_of_a_large_world_is_quick_and_exact() -> None:
    shape = replace(SHAPE, num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_heads=28, num_groups=4)
    shape = replace(shape, head_dim=128, vocab_size=152064)
    plan, weights = plan_of(shape, Grid(512, tensor=4, pipeline=2), Grid(512, tensor=4))
    entries = weights.engine_entries().values()
    numel = sum(int(np.prod(entry.layout.engine(entry.hf, 0, 4).shape)) for entry in entries)
    assert (plan.needed == numel).all()
    assert (plan.received + plan.local == numel).all()
