# SPDX-License-Identifier: Apache-2.0
"""Who sends which rectangle of which weight to whom: pure arithmetic on layouts, no weights and no communication.

Both sides describe their shards as rectangles of HF tensors (model_providers/weight_map.py). What an engine shard needs
is cut where the trainer's shards are cut; each piece goes to every engine rank that needs and does not hold it, from
the owner with the least to send. Pad rows belong to nobody; tied tensors are one engine parameter.
Geometry depends on shapes, not on layers, and ranks are numpy arrays: 4,096 ranks take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model_providers.weight_map import Block, Entry, HfTensor, Layout, Shard, WeightMap, intersect

Ranks = NDArray[np.int64]

NOBODY: Ranks = np.empty(0, np.int64)
NUM_SHARES = 20  # a piece larger than this part of what a rank sends on average is divided among its owners


@dataclass(frozen=True)
class Layouts:
    """Both grids of one world, ranks as in megatron_rl.runtime.parallel: trainer pp-dp-cp-tp, engine replica-tp.

    Experts have a grid of their own (pp-edp-ep-etp). `virtual` is the number of model chunks a stage holds.
    `engine_position[r]` is the place of rank r in the engine's grid, r itself unless placed otherwise.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    rollout_tensor: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    engine_position: tuple[int, ...] = ()

    @cached_property
    def _position(self) -> Ranks:
        return np.asarray(self.engine_position) if self.engine_position else np.arange(self.world)

    def engine_tp(self, rank: int) -> int:
        return int(self._position[rank]) % self.rollout_tensor

    def engine_ranks(self, tp: int) -> Ranks:
        """Ranks whose engine shard is number `tp`, ascending."""
        return np.flatnonzero(self._position % self.rollout_tensor == tp)

    def num_slots(self, expert: bool) -> int:
        """Into how many shards the trainer cuts a parameter of one stage."""
        return self.expert * self.expert_tensor if expert else self.tensor

    def trainer_ranks(self, stage: int, slot: int, expert: bool) -> Ranks:
        """Ranks that hold shard `slot` of a parameter of `stage`: the replicas over data (and context) parallel."""
        per_stage = self.world // self.pipeline
        first = stage * per_stage
        return np.arange(first + slot, first + per_stage, self.num_slots(expert))

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Chunks of layers go round the stages `virtual` times."""
        per_chunk = num_layers // (self.pipeline * self.virtual)
        return layer // per_chunk % self.pipeline


@dataclass(frozen=True, slots=True)
class Holder:
    """A trainer shard that contains a piece: rank r of `ranks` has it at `block` in its parameter `mcore`."""

    mcore: str
    block: Block
    ranks: Ranks


@dataclass(frozen=True, slots=True)
class Transfer:
    """One rectangle of one engine shard. `senders[i]` sends it to `receivers[i]`; ranks in `local` copy their own."""

    engine: str
    target: Block
    holders: tuple[Holder, ...]
    local: Ranks
    receivers: Ranks
    senders: Ranks

    @property
    def numel(self) -> int:
        return self.target.numel

    def source_on(self, rank: int) -> tuple[str, Block]:
        """Name and rectangle of the trainer parameter from which `rank` reads this piece."""
        for holder in self.holders:
            if rank in holder.ranks:
                return holder.mcore, holder.block
        raise KeyError(f"rank {rank} does not hold {self.engine} {self.target}")

    def split(self, max_numel: int) -> Iterator[Transfer]:
        """The piece in stretches of rows, none larger than `max_numel` (or one row)."""
        num_rows, num_cols = self.target.shape
        step = max(1, max_numel // num_cols)
        for start in range(0, num_rows, step):
            rows = (start, min(num_rows, start + step))
            holders = tuple(replace(h, block=_rows_of(h.block, rows)) for h in self.holders)
            yield replace(self, target=_rows_of(self.target, rows), holders=holders)


def _rows_of(block: Block, rows: tuple[int, int]) -> Block:
    first = block.rows[0]
    at = (block.at[0] + rows[0], block.at[1])
    return Block(block.hf, (first + rows[0], first + rows[1]), block.cols, at)


@dataclass(frozen=True)
class ReshardPlan:
    """All pieces of one sync, and what they amount to in elements per rank."""

    layouts: Layouts
    pieces: tuple[Transfer, ...]
    needed: NDArray[np.int64] = field(repr=False)
    """Elements of each rank's engine shard, pad rows excluded."""

    def without(self, engine_names: frozenset[str]) -> ReshardPlan:
        """The plan for the other parameters (frozen ones need no second sync)."""
        kept = tuple(p for p in self.pieces if p.engine not in engine_names)
        return ReshardPlan(self.layouts, kept, _count(kept, self.layouts.world, local=True, received=True))

    @cached_property
    def local(self) -> NDArray[np.int64]:
        return _count(self.pieces, self.layouts.world, local=True)

    @cached_property
    def received(self) -> NDArray[np.int64]:
        return _count(self.pieces, self.layouts.world, received=True)

    @cached_property
    def sent(self) -> NDArray[np.int64]:
        total = np.zeros(self.layouts.world, np.int64)
        for piece in self.pieces:
            np.add.at(total, piece.senders, piece.numel)
        return total


def _count(pieces: Sequence[Transfer], world: int, local: bool = False, received: bool = False) -> NDArray[np.int64]:
    total = np.zeros(world, np.int64)
    for piece in pieces:
        if local:
            total[piece.local] += piece.numel
        if received:
            total[piece.receivers] += piece.numel
    return total


def make_plan(weights: WeightMap, num_layers: int, layouts: Layouts) -> ReshardPlan:
    """The plan of one world; the same on every rank.

    Senders are chosen for pieces with few owners first, and among those for large ones: the flexible and the small
    fill what gaps are left, so that no rank sends much more than it must.
    """
    needed = np.zeros(layouts.world, np.int64)
    wanting = [layouts.engine_ranks(tp) for tp in range(layouts.rollout_tensor)]
    unsent: list[Transfer] = []
    for wanted in wanted_pieces(weights, num_layers, layouts):
        needed[wanting[wanted.engine_tp]] += wanted.target.numel
        unsent.append(_unsent_piece(wanted, wanting[wanted.engine_tp], layouts.world))
    mean_sent = sum(piece.numel * len(piece.receivers) for piece in unsent) // layouts.world
    parts = [part for piece in unsent for part in _divided(piece, max(1, mean_sent // NUM_SHARES))]
    load = np.zeros(layouts.world, np.int64)
    owners = [np.sort(np.concatenate([h.ranks for h in part.holders])) for part in parts]
    for i in sorted(range(len(parts)), key=lambda i: (len(owners[i]), -parts[i].numel)):
        parts[i] = replace(parts[i], senders=_least_loaded(owners[i], parts[i], load))
    return ReshardPlan(layouts, tuple(parts), needed)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A rectangle of engine shard number `engine_tp` that no trainer shard cuts further, and who holds it."""

    engine: str
    engine_tp: int
    target: Block
    holders: tuple[Holder, ...]


def wanted_pieces(weights: WeightMap, num_layers: int, layouts: Layouts) -> Iterator[Wanted]:
    """All pieces of all engine shards; depends on the grids, not on which rank has which place in the engine's."""
    geometry = _Geometry(layouts)
    for (engine_name, _), sources in sources_by_engine_name(weights, num_layers, layouts).items():
        for tp in range(layouts.rollout_tensor):
            for cut in geometry.cuts(sources[0][0], tp):
                yield Wanted(engine_name, tp, cut.target, tuple(_holders(sources, cut, layouts)))


Source = tuple[Entry, int]


EnginePart = tuple[str, tuple[HfTensor, ...]]  # engine parameter, HF tensors; all experts of a layer are one parameter


def sources_by_engine_name(weights: WeightMap, num_layers: int, layouts: Layouts) -> dict[EnginePart, list[Source]]:
    """Part of an engine parameter -> the trainer parameters that hold it, with their stage (two for a tied embedding
    under PP)."""
    sources: dict[EnginePart, list[Source]] = {}
    for name, entry in weights.entries.items():
        part = (entry.engine, entry.hf)
        if layouts.pipeline == 1 and name == "output_layer.weight" and part in sources:
            continue  # a tied output layer has no parameter of its own on a single stage
        sources.setdefault(part, []).append((entry, stage_of(name, num_layers, layouts)))
    return sources


def stage_of(mcore_name: str, num_layers: int, layouts: Layouts) -> int:
    """The pipeline stage that holds a parameter."""
    if mcore_name.startswith("decoder.layers."):
        return layouts.stage_of_layer(int(mcore_name.split(".")[2]), num_layers)
    return 0 if mcore_name.startswith("embedding.") else layouts.pipeline - 1


@dataclass(frozen=True, slots=True)
class CommonRectangle:
    """A rectangle of an engine shard that no trainer shard cuts further, and the trainer shards that contain it."""

    target: Block
    slots: tuple[tuple[int, Block], ...]


class _Geometry:
    """Cuts by shape: layers of one size share them, under the names of the first one seen."""

    def __init__(self, layouts: Layouts):
        self._layouts = layouts
        self._cuts: dict[tuple[Layout, tuple[tuple[int, int, bool], ...], int], list[CommonRectangle]] = {}

    def cuts(self, entry: Entry, engine_tp: int) -> list[CommonRectangle]:
        key = (entry.layout, tuple((t.rows, t.cols, t.is_vector) for t in entry.hf), engine_tp)
        if key not in self._cuts:
            self._cuts[key] = list(self._cut(entry, engine_tp))
        names = dict(zip((c.name for c in _numbered(entry.hf)), (t.name for t in entry.hf), strict=True))
        return [
            CommonRectangle(_rename(cut.target, names), tuple((slot, _rename(b, names)) for slot, b in cut.slots))
            for cut in self._cuts[key]
        ]

    def _cut(self, entry: Entry, engine_tp: int) -> Iterator[CommonRectangle]:
        hf, num_slots = _numbered(entry.hf), self._layouts.num_slots(entry.layout.is_expert)
        shards = [entry.layout.trainer(hf, slot, num_slots) for slot in range(num_slots)]
        for wanted in entry.layout.engine(hf, engine_tp, self._layouts.rollout_tensor).blocks:
            found: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, Block, Block]]] = {}
            for slot, shard in enumerate(shards):
                for source, target in _overlaps(shard, wanted):
                    found.setdefault((target.rows, target.cols), []).append((slot, source, target))
            for pieces in found.values():
                yield CommonRectangle(pieces[0][2], tuple((slot, source) for slot, source, _ in pieces))


def _overlaps(shard: Shard, wanted: Block) -> Iterator[tuple[Block, Block]]:
    for held in shard.blocks:
        if common := intersect(held, wanted):
            yield common


def _numbered(hf: Sequence[HfTensor]) -> list[HfTensor]:
    return [replace(tensor, name=str(index)) for index, tensor in enumerate(hf)]


def _rename(block: Block, names: Mapping[str, str]) -> Block:
    return Block(names[block.hf], block.rows, block.cols, block.at)


def _holders(sources: Sequence[Source], cut: CommonRectangle, layouts: Layouts) -> Iterator[Holder]:
    for entry, stage in sources:
        for slot, block in cut.slots:
            yield Holder(entry.mcore, block, layouts.trainer_ranks(stage, slot, entry.layout.is_expert))


def _unsent_piece(wanted: Wanted, wanting: Ranks, world: int) -> Transfer:
    holds = np.zeros(world, bool)
    for holder in wanted.holders:
        holds[holder.ranks] = True
    is_local = holds[wanting]
    return Transfer(wanted.engine, wanted.target, wanted.holders, wanting[is_local], wanting[~is_local], NOBODY)


def _divided(piece: Transfer, max_numel: int) -> Iterator[Transfer]:
    """In parts if that lets several owners share the sending of a piece that is much for one of them."""
    num_owners = sum(len(h.ranks) for h in piece.holders)
    if num_owners == 1 or len(piece.receivers) % num_owners == 0:
        yield piece
    else:
        yield from piece.split(max_numel)


def _least_loaded(owners: Ranks, piece: Transfer, load: Ranks) -> Ranks:
    """A sender for each receiver: who would have sent least with it. An owner takes at most two even shares."""
    num_receivers = len(piece.receivers)
    most = min(num_receivers, 2 * -(-num_receivers // len(owners)))
    load_with = load[owners, None] + piece.numel * np.arange(1, most + 1)
    chosen = np.argsort(load_with, axis=None, kind="stable")[:num_receivers]
    senders = np.sort(owners[chosen // max(1, most)])  # both in order of rank: near to each other rather than far
    np.add.at(load, senders, piece.numel)
    return senders
