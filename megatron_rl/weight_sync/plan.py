# SPDX-License-Identifier: Apache-2.0
"""Who sends which rectangle of which weight to whom: pure arithmetic on grids, no weights and no communication.

Both sides describe their shards as rectangles of HF tensors (model_providers/weight_map.py). What an engine shard needs
is divided where the trainer's shards are; each rectangle goes to every engine rank that needs and does not hold it,
from the owner with the least to send. Pad rows belong to nobody; tied tensors are one engine parameter. The grids may
have the same ranks or different ones: a rank that has no part in one of them holds, or needs, nothing.
Geometry depends on shapes, not on layers, and ranks are numpy arrays: 4,096 ranks take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_rl.runtime.grid import Grid
from model_providers.weight_map import Block, Entry, HfTensor, Layout, Shard, WeightMap, intersect

Ranks = NDArray[np.int64]

NOBODY: Ranks = np.empty(0, np.int64)
NUM_SHARES = 20  # a transfer larger than this part of what a rank sends on average is divided among its owners


@dataclass(frozen=True, slots=True)
class Holder:
    """A trainer shard that contains a rectangle: rank r of `ranks` has it at `block` in its parameter `mcore`."""

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
        """Name and rectangle of the trainer parameter from which `rank` reads this rectangle."""
        for holder in self.holders:
            if rank in holder.ranks:
                return holder.mcore, holder.block
        raise KeyError(f"rank {rank} does not hold {self.engine} {self.target}")

    def split(self, max_numel: int) -> Iterator[Transfer]:
        """The transfer in stretches of rows, none larger than `max_numel` (or one row)."""
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
    """All transfers of one sync, and what they amount to in elements per rank.

    `engine_position[i]` is the place in the engine's grid of its rank number i, i itself unless placed otherwise.
    """

    trainer: Grid
    engine: Grid
    transfers: tuple[Transfer, ...]
    needed: NDArray[np.int64] = field(repr=False)
    """Elements of each rank's engine shard, pad rows excluded."""
    engine_position: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        return world_of(self.trainer, self.engine)

    def engine_tp(self, rank: int) -> int:
        """The number of the engine shard that `rank` holds."""
        index = self.engine.ranks.index(rank)
        return (self.engine_position[index] if self.engine_position else index) % self.engine.tensor

    def without(self, engine_names: frozenset[str]) -> ReshardPlan:
        """The plan for the other parameters (frozen ones need no second sync)."""
        kept = tuple(t for t in self.transfers if t.engine not in engine_names)
        return replace(self, transfers=kept, needed=_count(kept, self.world, local=True, received=True))

    @cached_property
    def local(self) -> NDArray[np.int64]:
        return _count(self.transfers, self.world, local=True)

    @cached_property
    def received(self) -> NDArray[np.int64]:
        return _count(self.transfers, self.world, received=True)

    @cached_property
    def sent(self) -> NDArray[np.int64]:
        total = np.zeros(self.world, np.int64)
        for transfer in self.transfers:
            np.add.at(total, transfer.senders, transfer.numel)
        return total


def world_of(trainer: Grid, engine: Grid) -> int:
    """The number of ranks that have a part in either grid; they are numbered from 0."""
    return max(trainer.ranks.stop, engine.ranks.stop)


def _count(transfers: Sequence[Transfer], world: int, local: bool = False, received: bool = False) -> NDArray[np.int64]:
    total = np.zeros(world, np.int64)
    for transfer in transfers:
        if local:
            total[transfer.local] += transfer.numel
        if received:
            total[transfer.receivers] += transfer.numel
    return total


def build_plan(
    weights: WeightMap, num_layers: int, trainer: Grid, engine: Grid, engine_position: tuple[int, ...] = ()
) -> ReshardPlan:
    """The plan of one job; the same on every rank.

    Senders are chosen for rectangles with few owners first, and among those for large ones: the flexible and the small
    fill what gaps are left, so that no rank sends much more than it must.
    """
    world = world_of(trainer, engine)
    needed = np.zeros(world, np.int64)
    wanting = _ranks_by_shard(engine, engine_position)
    unsent: list[Transfer] = []
    for wanted in wanted_rectangles(weights, num_layers, trainer, engine):
        needed[wanting[wanted.engine_tp]] += wanted.target.numel
        unsent.append(_unsent(wanted, wanting[wanted.engine_tp], world))
    mean_sent = sum(transfer.numel * len(transfer.receivers) for transfer in unsent) // trainer.world
    transfers = [part for whole in unsent for part in _divided(whole, max(1, mean_sent // NUM_SHARES))]
    load = np.zeros(world, np.int64)
    owners = [np.sort(np.concatenate([h.ranks for h in transfer.holders])) for transfer in transfers]
    for i in sorted(range(len(transfers)), key=lambda i: (len(owners[i]), -transfers[i].numel)):
        transfers[i] = replace(transfers[i], senders=_least_loaded(owners[i], transfers[i], load))
    return ReshardPlan(trainer, engine, tuple(transfers), needed, engine_position)


def _ranks_by_shard(engine: Grid, engine_position: tuple[int, ...]) -> list[Ranks]:
    """Ranks whose engine shard is number 0, 1, ..., ascending."""
    position = np.asarray(engine_position) if engine_position else np.arange(engine.world)
    return [engine.first_rank + np.flatnonzero(position % engine.tensor == tp) for tp in range(engine.tensor)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A rectangle of engine shard number `engine_tp` that no trainer shard divides further, and who holds it."""

    engine: str
    engine_tp: int
    target: Block
    holders: tuple[Holder, ...]


def wanted_rectangles(weights: WeightMap, num_layers: int, trainer: Grid, engine: Grid) -> Iterator[Wanted]:
    """All rectangles of all engine shards; depends on the grids, not on which rank has which place in the engine's."""
    geometry = _Geometry(trainer, engine)
    for (engine_name, _), sources in sources_by_engine_name(weights, num_layers, trainer).items():
        for tp in range(engine.tensor):
            for common in geometry.common(sources[0][0], tp):
                yield Wanted(engine_name, tp, common.target, tuple(_holders(sources, common, trainer)))


TrainerPart = tuple[Entry, int]


EnginePart = tuple[str, tuple[HfTensor, ...]]  # engine parameter, HF tensors; all experts of a layer are one parameter


def sources_by_engine_name(weights: WeightMap, num_layers: int, trainer: Grid) -> dict[EnginePart, list[TrainerPart]]:
    """Part of an engine parameter -> the trainer parameters that hold it, with their stage (two for a tied embedding
    under PP)."""
    sources: dict[EnginePart, list[TrainerPart]] = {}
    for name, entry in weights.entries.items():
        part = (entry.engine, entry.hf)
        if trainer.pipeline == 1 and name == "output_layer.weight" and part in sources:
            continue  # a tied output layer has no parameter of its own on a single stage
        sources.setdefault(part, []).append((entry, stage_of(name, num_layers, trainer)))
    return sources


def stage_of(mcore_name: str, num_layers: int, trainer: Grid) -> int:
    """The pipeline stage that holds a parameter."""
    if mcore_name.startswith("decoder.layers."):
        return trainer.stage_of_layer(int(mcore_name.split(".")[2]), num_layers)
    return 0 if mcore_name.startswith("embedding.") else trainer.pipeline - 1


@dataclass(frozen=True, slots=True)
class CommonRectangle:
    """A rectangle of an engine shard that no trainer shard divides further, and the trainer shards that contain it."""

    target: Block
    slots: tuple[tuple[int, Block], ...]


class _Geometry:
    """Common rectangles by shape: layers of one size share them, under the names of the first one seen."""

    def __init__(self, trainer: Grid, engine: Grid):
        self._trainer, self._engine = trainer, engine
        self._found: dict[tuple[Layout, tuple[tuple[int, int, bool], ...], int], list[CommonRectangle]] = {}

    def common(self, entry: Entry, engine_tp: int) -> list[CommonRectangle]:
        key = (entry.layout, tuple((t.rows, t.cols, t.is_vector) for t in entry.hf), engine_tp)
        if key not in self._found:
            self._found[key] = list(self._find(entry, engine_tp))
        names = dict(zip((c.name for c in _numbered(entry.hf)), (t.name for t in entry.hf), strict=True))
        return [
            CommonRectangle(_rename(one.target, names), tuple((slot, _rename(b, names)) for slot, b in one.slots))
            for one in self._found[key]
        ]

    def _find(self, entry: Entry, engine_tp: int) -> Iterator[CommonRectangle]:
        hf, num_slots = _numbered(entry.hf), self._trainer.num_slots(entry.layout.is_expert)
        shards = [entry.layout.trainer(hf, slot, num_slots) for slot in range(num_slots)]
        for wanted in entry.layout.engine(hf, engine_tp, self._engine.tensor).blocks:
            found: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, Block, Block]]] = {}
            for slot, shard in enumerate(shards):
                for source, target in _overlaps(shard, wanted):
                    found.setdefault((target.rows, target.cols), []).append((slot, source, target))
            for holding in found.values():
                yield CommonRectangle(holding[0][2], tuple((slot, source) for slot, source, _ in holding))


def _overlaps(shard: Shard, wanted: Block) -> Iterator[tuple[Block, Block]]:
    for held in shard.blocks:
        if common := intersect(held, wanted):
            yield common


def _numbered(hf: Sequence[HfTensor]) -> list[HfTensor]:
    return [replace(tensor, name=str(index)) for index, tensor in enumerate(hf)]


def _rename(block: Block, names: Mapping[str, str]) -> Block:
    return Block(names[block.hf], block.rows, block.cols, block.at)


def _holders(sources: Sequence[TrainerPart], common: CommonRectangle, trainer: Grid) -> Iterator[Holder]:
    for entry, stage in sources:
        for slot, block in common.slots:
            yield Holder(entry.mcore, block, np.array(trainer.ranks_of_slot(stage, slot, entry.layout.is_expert)))


def _unsent(wanted: Wanted, wanting: Ranks, world: int) -> Transfer:
    holds = np.zeros(world, bool)
    for holder in wanted.holders:
        holds[holder.ranks] = True
    is_local = holds[wanting]
    return Transfer(wanted.engine, wanted.target, wanted.holders, wanting[is_local], wanting[~is_local], NOBODY)


def _divided(transfer: Transfer, max_numel: int) -> Iterator[Transfer]:
    """In parts if that lets several owners share the sending of what is much for one of them."""
    num_owners = sum(len(h.ranks) for h in transfer.holders)
    if num_owners == 1 or len(transfer.receivers) % num_owners == 0:
        yield transfer
    else:
        yield from transfer.split(max_numel)


def _least_loaded(owners: Ranks, transfer: Transfer, load: Ranks) -> Ranks:
    """A sender for each receiver: who would have sent least with it. An owner takes at most two even shares."""
    num_receivers = len(transfer.receivers)
    most = min(num_receivers, 2 * -(-num_receivers // len(owners)))
    load_with = load[owners, None] + transfer.numel * np.arange(1, most + 1)
    chosen = np.argsort(load_with, axis=None, kind="stable")[:num_receivers]
    senders = np.sort(owners[chosen // max(1, most)])  # both in order of rank: near to each other rather than far
    np.add.at(load, senders, transfer.numel)
    return senders
