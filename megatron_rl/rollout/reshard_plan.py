# SPDX-License-Identifier: Apache-2.0
"""Who sends which rectangle of which weight to whom: pure arithmetic on layouts, no weights and no communication.

Both sides describe their shards as rectangles of HF tensors (model_providers/weight_map.py). What an engine rank needs
and does not hold itself is the intersection of its rectangles with the owners'; each piece is sent once, by the owner
with the least to send so far. Pad rows belong to nobody, tied tensors are one engine parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model_providers.weight_map import Block, Entry, Shard, WeightMap, intersect


@dataclass(frozen=True, slots=True)
class Layouts:
    """Both grids of one world. Ranks as in megatron_rl.parallel: trainer pp-dp-cp-tp, engine replica-tp."""

    world: int
    tensor: int
    pipeline: int
    context: int
    rollout_tensor: int

    def trainer_tp(self, rank: int) -> int:
        return rank % self.tensor

    def trainer_pp(self, rank: int) -> int:
        return rank // (self.world // self.pipeline)

    def engine_tp(self, rank: int) -> int:
        return rank % self.rollout_tensor


@dataclass(frozen=True, slots=True)
class Move:
    """One rectangle: `source` lies in a trainer parameter of rank `sender`, `target` in an engine parameter of
    `receiver`."""

    sender: int
    receiver: int
    mcore: str
    engine: str
    source: Block
    target: Block


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """All moves of one sync. Moves with sender == receiver are local copies and cost no message."""

    moves: tuple[Move, ...]
    needed: tuple[int, ...]
    """Elements each engine rank needs, pad rows excluded."""

    def received(self, rank: int) -> int:
        return sum(m.target.numel for m in self.moves if m.receiver == rank != m.sender)

    def sent(self, rank: int) -> int:
        return sum(m.source.numel for m in self.moves if m.sender == rank != m.receiver)

    def local(self, rank: int) -> int:
        return sum(m.target.numel for m in self.moves if m.receiver == rank == m.sender)


def stage_of(mcore_name: str, num_layers: int, pipeline: int) -> int:
    """The pipeline stage that holds a parameter; the tied copy of the embedding on the last stage has its own name."""
    if mcore_name.startswith("decoder.layers."):
        return int(mcore_name.split(".")[2]) // (num_layers // pipeline)
    return 0 if mcore_name.startswith("embedding.") else pipeline - 1


def make_plan(weights: WeightMap, num_layers: int, layouts: Layouts) -> ReshardPlan:
    """The plan of one world; the same on every rank."""
    moves: list[Move] = []
    needed = [0] * layouts.world
    load = [0] * layouts.world
    for engine_name, sources in _sources_by_engine_name(weights, num_layers, layouts).items():
        entry = sources[0][0]
        targets = {
            tp: entry.layout.engine(entry.hf, tp, layouts.rollout_tensor) for tp in range(layouts.rollout_tensor)
        }
        owned = [(e, rank, shard) for e, ranks, shard in _shards(sources, layouts) for rank in ranks]
        for receiver in range(layouts.world):
            target = targets[layouts.engine_tp(receiver)]
            needed[receiver] += sum(b.numel for b in target.blocks)
            moves += _cover(engine_name, target, receiver, owned, load)
    return ReshardPlan(tuple(moves), tuple(needed))


Source = tuple[Entry, int]
Owned = tuple[Entry, int, Shard]


def _sources_by_engine_name(weights: WeightMap, num_layers: int, layouts: Layouts) -> dict[str, list[Source]]:
    """Engine parameter -> the trainer parameters that hold it, with their stage (two for a tied embedding under PP)."""
    sources: dict[str, list[Source]] = {}
    for name, entry in weights.entries.items():
        if layouts.pipeline == 1 and entry.engine in sources:
            continue  # a tied output layer has no parameter of its own on a single stage
        sources.setdefault(entry.engine, []).append((entry, stage_of(name, num_layers, layouts.pipeline)))
    return sources


def _shards(sources: Sequence[Source], layouts: Layouts) -> list[tuple[Entry, list[int], Shard]]:
    shards = []
    for entry, stage in sources:
        for tp in range(layouts.tensor):
            ranks = [r for r in range(layouts.world) if layouts.trainer_pp(r) == stage and layouts.trainer_tp(r) == tp]
            shards.append((entry, ranks, entry.layout.trainer(entry.hf, tp, layouts.tensor)))
    return shards


def _cover(engine_name: str, target: Shard, receiver: int, owned: Sequence[Owned], load: list[int]) -> list[Move]:
    """Moves that fill every rectangle of `target` exactly once: from this rank where it can, else from the least
    loaded."""
    moves = []
    for wanted in target.blocks:
        for pieces in _owners_by_rectangle(wanted, owned).values():
            local = [p for p in pieces if p[1] == receiver]
            entry, sender, source, goal = local[0] if local else min(pieces, key=lambda p: (load[p[1]], p[1]))
            if sender != receiver:
                load[sender] += goal.numel
            moves.append(Move(sender, receiver, entry.mcore, engine_name, source, goal))
    return moves


def _owners_by_rectangle(
    wanted: Block, owned: Sequence[Owned]
) -> dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[Entry, int, Block, Block]]]:
    """The rectangles into which the owners' shards cut `wanted`, each with everyone who holds it."""
    pieces: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[Entry, int, Block, Block]]] = {}
    for entry, rank, shard in owned:
        for held in shard.blocks:
            if common := intersect(held, wanted):
                source, goal = common
                pieces.setdefault((goal.rows, goal.cols), []).append((entry, rank, source, goal))
    return pieces
