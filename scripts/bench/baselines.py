# SPDX-License-Identifier: Apache-2.0
"""What `resharder.py` measures the resharder against, and how bytes and memory are counted.

Every public stack that holds Megatron and vLLM in one process gathers full HF tensors on every rank and hands them to
vLLM's loader, one by one or in buckets; Megatron-core has a resharder of its own, from one Megatron model to another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import stage_of
from model_providers.weight_map import Entry, Replicated, Shard, WeightMap, intersect

Load = Callable[[Iterator[tuple[str, Tensor]]], None]
BUCKET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters of one pipeline stage that are gathered together."""

    stage: int
    replicated: bool
    entries: tuple[Entry, ...]


class FullGather:
    """PP broadcast and TP all-gather of every tensor to every rank, then vLLM's own loader. `source` is this rank's
    {Megatron name: weight}."""

    def __init__(
        self, weights: WeightMap, num_layers: int, trainer: Grid, source: Mapping[str, Tensor], bucket_bytes: int
    ):
        self._tensor, self._source = trainer.tensor, source
        self._like = next(iter(source.values()))
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self._pp_group = parallel_state.get_pipeline_model_parallel_group()
        self._stage_ranks = dist.get_process_group_ranks(self._pp_group)
        numel = bucket_bytes // self._like.element_size()
        self._buckets = tuple(_buckets(weights, num_layers, trainer, numel))

    def run(self, load: Load) -> None:
        """One call of the loader, which draws tensors from the gathers as it goes."""
        load(tensor for bucket in self._buckets for tensor in self._gather(bucket))

    def _gather(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        flat = self._local(bucket)
        if len(self._stage_ranks) > 1:
            dist.broadcast(flat, src=self._stage_ranks[bucket.stage], group=self._pp_group)
        num_shards = 1 if bucket.replicated else self._tensor
        if num_shards > 1:
            gathered = flat.new_empty(num_shards * flat.numel())
            dist.all_gather_into_tensor(gathered, flat, group=self._tp_group)
            flat = gathered
        shards, offset = flat.view(num_shards, -1), 0
        for entry in bucket.entries:
            numel = _numel(entry, self._tensor)
            yield from _assemble(entry, shards[:, offset : offset + numel])
            offset += numel

    def _local(self, bucket: Bucket) -> Tensor:
        """This rank's shards as one flat tensor; room for them on ranks of other stages. A single one is not copied."""
        if dist.get_rank() == self._stage_ranks[bucket.stage]:
            parts = [self._source[entry.mcore].view(-1) for entry in bucket.entries]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._like.new_empty(sum(_numel(entry, self._tensor) for entry in bucket.entries))


def _numel(entry: Entry, tensor: int) -> int:
    return torch.Size(entry.layout.trainer(entry.hf, 0, tensor).shape).numel()


def _buckets(weights: WeightMap, num_layers: int, trainer: Grid, max_numel: int) -> Iterator[Bucket]:
    """Parameters in model order; a bucket holds at most `max_numel` gathered elements, or one parameter."""
    kinds: dict[tuple[int, bool], list[Entry]] = {}
    for entry in weights.engine_entries().values():
        key = (stage_of(entry.mcore, num_layers, trainer), isinstance(entry.layout, Replicated))
        kinds.setdefault(key, []).append(entry)
    for (stage, replicated), entries in sorted(kinds.items()):
        chosen: list[Entry] = []
        size = 0
        for entry in entries:
            added = _numel(entry, trainer.tensor) * trainer.tensor
            if chosen and size + added > max_numel:
                yield Bucket(stage, replicated, tuple(chosen))
                chosen, size = [], 0
            chosen.append(entry)
            size += added
        yield Bucket(stage, replicated, tuple(chosen))


def _assemble(entry: Entry, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
    """HF tensors from the shards of all tensor parallel ranks, one row each."""
    full = {hf.name: shards.new_empty(hf.shape) for hf in entry.hf}
    for tp, part in enumerate(shards):
        shard = entry.layout.trainer(entry.hf, tp, len(shards))
        for block in shard.blocks:
            as_matrix(full[block.hf])[block.hf_slices].copy_(part.view(shard.shape[0], -1)[block.local_slices])
    yield from full.items()


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


class CoreResharding:
    """megatron.core.resharding into a second Megatron model in the engine's layout, then local copies into vLLM's.

    `middle` is that model, `middle_weights` its {table name: weight}.
    """

    def __init__(self, trainer: Any, middle: Any, middle_weights: Mapping[str, Tensor], device: str):
        self._trainer, self._middle = trainer, middle
        self._weights = middle_weights
        self._device = device

    def run(self, copies: Iterable[tuple[Tensor, Tensor]]) -> None:
        from megatron.core.resharding.refit import swap_model_weights

        if self._device == "cuda":
            swap_model_weights(self._trainer, self._middle, "nccl")
        else:
            with gloo_service_without_stream():
                swap_model_weights(self._trainer, self._middle, "gloo")
        for source, target in copies:
            target.copy_(source)

    def copies(
        self, weights: WeightMap, rank: int, world: int, target: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """(view of the second model, view of the engine): the two cut the same elements, in another order."""
        views = []
        for entry in weights.engine_entries().values():
            held, wanted = entry.layout.trainer(entry.hf, rank, world), entry.layout.engine(entry.hf, rank, world)
            source, engine = as_matrix(self._weights[entry.mcore]), as_matrix(target[entry.engine])
            for mine, theirs in _common(held, wanted):
                views.append((source[mine.local_slices], engine[theirs.local_slices]))
        return views


def _common(held: Shard, wanted: Shard) -> Iterator[Any]:
    for mine in held.blocks:
        for theirs in wanted.blocks:
            if common := intersect(mine, theirs):
                yield common


def gloo_service_without_stream() -> Any:
    """Megatron-core 0.16.1's Gloo service opens a CUDA stream that it only waits for; without one it skips the wait."""
    return mock.patch.object(torch.cuda, "Stream", lambda *_: None)


class ReceivedBytes:
    """Within the block, adds up what this rank receives, at the calls that communicate tensors."""

    def __init__(self) -> None:
        self.total = 0
        self.num_messages = 0

    def __enter__(self) -> ReceivedBytes:
        self._patches = ExitStack()
        counted: dict[str, Callable[..., int]] = {
            "P2POp": _p2p,
            "broadcast": _broadcast,
            "all_gather_into_tensor": _all_gather,
            "reduce_scatter_tensor": _reduce_scatter,
            "all_to_all_single": _all_to_all,
        }
        for name, count in counted.items():
            self._patches.enter_context(mock.patch.object(dist, name, self._counted(getattr(dist, name), count)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _counted(self, call: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            received = count(*args, **kwargs)
            self.total += received
            self.num_messages += received > 0
            return call(*args, **kwargs)

        return counted


def _p2p(op: Any, tensor: Tensor, *_: Any, **__: Any) -> int:
    return tensor.nbytes if op is dist.irecv else 0


def _broadcast(tensor: Tensor, src: int, **_: Any) -> int:
    return 0 if src == dist.get_rank() else tensor.nbytes


def _all_gather(output: Tensor, own: Tensor, **_: Any) -> int:
    return output.nbytes - own.nbytes


def _reduce_scatter(output: Tensor, inputs: Tensor, **_: Any) -> int:
    return inputs.nbytes - output.nbytes


def _all_to_all(
    output: Tensor, inputs: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> int:
    return output.nbytes - received[group.rank()] * output.element_size()


class LiveBytes(TorchDispatchMode):
    """Within the block, `peak` is the largest sum of tensor storages that were allocated in it and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, 0)  # not made by any call before: it was there when the block began
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self.live += size
            self._known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
