# SPDX-License-Identifier: Apache-2.0
"""One weight table per model family; every reader of weights (HF load, HF export, rollout sync, tests) uses it.

A layout is a pure function from (rank, world) to rectangles of Hugging Face tensors: which part of which HF tensor lies
where in the local shard. Trainer and engine each have one; whatever must move between them is an intersection of
rectangles. Vectors count as one column. "HF name" = key in model.safetensors.index.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

Interval = tuple[int, int]

VOCAB_MULTIPLE = 128  # trainer: rows of the embedding are padded to a multiple of this and of the tensor parallel size
ENGINE_VOCAB_MULTIPLE = 64  # engine: vLLM's DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, slots=True)
class HfTensor:
    name: str
    rows: int
    cols: int = 1
    is_vector: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows,) if self.is_vector else (self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Block:
    """HF elements [rows, cols] of `hf`, lying in the local shard with its first element at row, column `at`."""

    hf: str
    rows: Interval
    cols: Interval
    at: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def local_slices(self) -> tuple[slice, slice]:
        (row, col), (num_rows, num_cols) = self.at, self.shape
        return slice(row, row + num_rows), slice(col, col + num_cols)

    @property
    def hf_slices(self) -> tuple[slice, slice]:
        return slice(*self.rows), slice(*self.cols)


def intersect(mine: Block, theirs: Block) -> tuple[Block, Block] | None:
    """The common rectangle of two blocks of one HF tensor, as seen from either side; None when they do not meet."""
    if mine.hf != theirs.hf:
        return None
    rows = (max(mine.rows[0], theirs.rows[0]), min(mine.rows[1], theirs.rows[1]))
    cols = (max(mine.cols[0], theirs.cols[0]), min(mine.cols[1], theirs.cols[1]))
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return None

    def seen_from(block: Block) -> Block:
        at = (block.at[0] + rows[0] - block.rows[0], block.at[1] + cols[0] - block.cols[0])
        return Block(block.hf, rows, cols, at)

    return seen_from(mine), seen_from(theirs)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of one parameter: its local shape (padding included) and the HF rectangles that fill it."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


class Layout(Protocol):
    """How one fused or plain parameter is split by the trainer (`trainer`) and by vLLM (`engine`). Hashable.

    `is_expert` parameters are split over the trainer's expert grid instead of its tensor parallel ranks.
    """

    is_expert: ClassVar[bool]

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard: ...

    def engine(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard: ...


def even_split(size: int, rank: int, world: int, what: str) -> Interval:
    if size % world:
        raise ValueError(f"{what}={size}: not divisible by tensor parallel size {world}; choose another size")
    return size // world * rank, size // world * (rank + 1)


def _stack(intervals: Iterable[tuple[HfTensor, Interval]]) -> tuple[int, tuple[Block, ...]]:
    """(number of rows, blocks) of row intervals of HF tensors, one below the other."""
    blocks, height = [], 0
    for hf, (start, stop) in intervals:
        blocks.append(Block(hf.name, (start, stop), (0, hf.cols), (height, 0)))
        height += stop - start
    return height, tuple(blocks)


def _stacked_shard(intervals: Iterable[tuple[HfTensor, Interval]], like: HfTensor) -> Shard:
    height, blocks = _stack(intervals)
    return Shard((height,) if like.is_vector else (height, like.cols), blocks)


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds all of it (norms)."""

    is_expert: ClassVar[bool] = False

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        return _stacked_shard([(hf[0], (0, hf[0].rows))], hf[0])

    engine = trainer


@dataclass(frozen=True, slots=True)
class SplitCols:
    """Row parallel linear: the input dimension is split."""

    is_expert: ClassVar[bool] = False

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        start, stop = even_split(hf[0].cols, rank, world, hf[0].name)
        block = Block(hf[0].name, (0, hf[0].rows), (start, stop), (0, 0))
        return Shard((hf[0].rows, stop - start), (block,))

    engine = trainer


@dataclass(frozen=True, slots=True)
class Vocab:
    """Embedding and output rows, padded to different sizes on the two sides; pad rows belong to nobody."""

    is_expert: ClassVar[bool] = False

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        return self._padded_split(hf[0], padded_vocab(hf[0].rows, world), rank, world)

    def engine(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        return self._padded_split(hf[0], _round_up(hf[0].rows, ENGINE_VOCAB_MULTIPLE), rank, world)

    def _padded_split(self, hf: HfTensor, padded: int, rank: int, world: int) -> Shard:
        start, stop = even_split(padded, rank, world, f"padded vocabulary of {hf.name}")
        real = (min(start, hf.rows), min(stop, hf.rows))
        blocks = (Block(hf.name, real, (0, hf.cols), (0, 0)),) if real[0] < real[1] else ()
        return Shard((stop - start, hf.cols), blocks)


@dataclass(frozen=True, slots=True)
class GatedUp:
    """Gate and up projection, [gate_r ; up_r] on each rank of either side."""

    is_expert: ClassVar[bool] = False

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        return _stacked_shard([(t, even_split(t.rows, rank, world, t.name)) for t in hf], hf[0])

    engine = trainer


@dataclass(frozen=True, slots=True)
class QKV:
    """Attention input. Trainer: [q..q k v] per KV group, then split evenly. Engine: [Q_r | K_r | V_r], KV heads
    repeated if few."""

    is_expert: ClassVar[bool] = False
    num_heads: int
    num_groups: int
    head_dim: int

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        q, k, v = hf
        q_rows, dim = self.num_heads // self.num_groups * self.head_dim, self.head_dim
        fused: list[tuple[HfTensor, Interval]] = []
        for g in range(self.num_groups):
            fused += [(q, (g * q_rows, (g + 1) * q_rows)), (k, (g * dim, (g + 1) * dim)), (v, (g * dim, (g + 1) * dim))]
        window = even_split(sum(t.rows for t in hf), rank, world, f"fused rows of {q.name}")
        return _stacked_shard(_clip(fused, window), q)

    def engine(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        q, k, v = hf
        if self.num_groups >= world:
            kv = even_split(k.rows, rank, world, k.name)
        else:
            if world % self.num_groups:
                raise ValueError(
                    f"rollout.tensor={world}: not a multiple of {self.num_groups} KV heads; choose another size"
                )
            kv = even_split(k.rows, rank // (world // self.num_groups), self.num_groups, k.name)
        return _stacked_shard([(q, even_split(q.rows, rank, world, q.name)), (k, kv), (v, kv)], q)


@dataclass(frozen=True, slots=True)
class Expert:
    """Expert `index` of `num_experts`, split as `inner` splits. Trainer: on the slots of one expert parallel rank, over
    `expert_tensor` ranks. Engine: part of one tensor [expert, row, column] that holds all experts, each split over the
    tensor ranks."""

    is_expert: ClassVar[bool] = True
    inner: GatedUp | SplitCols
    index: int
    num_experts: int
    expert_tensor: int = 1

    def trainer(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        ep_rank, tensor_rank = divmod(rank, self.expert_tensor)
        first, stop = even_split(self.num_experts, ep_rank, world // self.expert_tensor, "number of experts")
        shard = self.inner.trainer(hf, tensor_rank, self.expert_tensor)
        return shard if first <= self.index < stop else Shard((0, *shard.shape[1:]), ())

    def engine(self, hf: Sequence[HfTensor], rank: int, world: int) -> Shard:
        shard = self.inner.engine(hf, rank, world)
        first = self.index * shard.shape[0]  # rows, the tensor seen as a matrix
        moved = (Block(b.hf, b.rows, b.cols, (first + b.at[0], b.at[1])) for b in shard.blocks)
        return Shard((self.num_experts, *shard.shape), tuple(moved))


def _clip(intervals: Iterable[tuple[HfTensor, Interval]], window: Interval) -> Iterable[tuple[HfTensor, Interval]]:
    """The rows `window` of row intervals that stand one below the other; it may begin and end inside one."""
    height = 0
    for hf, (start, stop) in intervals:
        low = max(start, start + window[0] - height)
        high = min(stop, start + window[1] - height)
        if low < high:
            yield hf, (low, high)
        height += stop - start


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded_vocab(rows: int, tensor_parallel: int) -> int:
    """Embedding rows in the trainer: the same for every usual tensor parallel size, so that checkpoints move freely."""
    return _round_up(rows, math.lcm(VOCAB_MULTIPLE, tensor_parallel))


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter (or, with `*` for the layer index, one per layer): its names in the three worlds and its layout."""

    mcore: str
    engine: str
    hf: tuple[HfTensor, ...]
    layout: Layout


class WeightMap:
    """All language-model weights of one checkpoint, one Entry per parameter (layer indices filled in)."""

    def __init__(self, entries: Iterable[Entry], num_layers: int):
        self.entries = {e.mcore: e for entry in entries for e in _per_layer(entry, num_layers)}

    def __getitem__(self, mcore_name: str) -> Entry:
        if mcore_name not in self.entries:
            raise KeyError(f"no entry in the weight table for the Megatron parameter {mcore_name!r}")
        return self.entries[mcore_name]

    def hf_tensors(self) -> dict[str, HfTensor]:
        return {t.name: t for entry in self.entries.values() for t in entry.hf}

    def engine_entries(self) -> dict[str, Entry]:
        """Entries by engine parameter; tied tensors, which two Megatron parameters share, appear once. Of the experts
        of a layer, which share an engine parameter, the first one is there."""
        return {entry.engine: entry for entry in reversed(self.entries.values())}


def _per_layer(entry: Entry, num_layers: int) -> Iterable[Entry]:
    if "*" not in entry.mcore:
        yield entry
        return
    for layer in range(num_layers):
        hf = tuple(HfTensor(t.name.replace("*", str(layer)), t.rows, t.cols, t.is_vector) for t in entry.hf)
        yield Entry(entry.mcore.replace("*", str(layer)), entry.engine.replace("*", str(layer)), hf, entry.layout)


# Local layer specs keep the two norms of a layer apart; Transformer Engine fuses them into the linear behind them. The
# table uses the fused names, as Megatron-core's checkpoints do.
_FUSED_NORMS = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)


# SequentialMLP has a module for each local expert; Transformer Engine's grouped linears number their weights.
_EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<index>\d+)\.(?P<linear>linear_fc[12])\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<index>\d+)"),
)


def canonical_name(name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """Table name of a parameter of one rank: global layer and expert indices, fused norm names."""
    if match := re.match(r"decoder\.layers\.(\d+)\.(.+)", name):
        rest = dict(_FUSED_NORMS).get(match[2], match[2])
        for pattern in _EXPERT_NAMES:
            if expert := pattern.fullmatch(rest):
                rest = f"mlp.experts.{int(expert['index']) + expert_offset}.{expert['linear']}.weight"
        return f"decoder.layers.{int(match[1]) + layer_offset}.{rest}"
    return name
