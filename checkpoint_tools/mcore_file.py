# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's torch_dist files, read and written tensor by tensor, without a model or a process group.

Megatron-core stacks the layers of a homogeneous model: `decoder.layers.3.mlp.linear_fc2.weight` is row 3 of the tensor
`decoder.layers.mlp.linear_fc2.weight`. Both directions go through torch's distributed checkpoint planners,
which ask for one piece at a time; so memory holds one parameter of one layer, whatever the size of the model.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoint_tools.intact import read_metadata

FORMAT = CheckpointingConfig("torch_dist", 1, "torch", 1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in the file: a tensor and, if it has one, the layer along its first axis."""

    key: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.key if self.layer is None else f"{self.key}[{self.layer}]"


def place_of(name: str) -> Place:
    """Place of a parameter by its name in the weight table."""
    if match := re.match(r"decoder\.layers\.(\d+)\.(.+)", name):
        return Place(f"decoder.layers.{match[2]}", int(match[1]))
    return Place(name)


class McoreFile:
    """The tensors of one checkpoint folder. Nothing is read before it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            metadata = read_metadata(folder)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; copy the checkpoint again") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def shape(self, place: Place) -> tuple[int, ...] | None:
        """Shape of a parameter; None if the file does not hold it."""
        stored = self.tensors.get(place.key)
        if stored is None:
            return None
        if place.layer is None:
            return tuple(stored.size)
        return tuple(stored.size[1:]) if place.layer < stored.size[0] else None

    def dtype(self, place: Place) -> torch.dtype:
        return self.tensors[place.key].properties.dtype

    def read(self, place: Place) -> Tensor:
        stored = self.tensors[place.key]
        offsets = torch.Size([place.layer or 0, *[0] * (len(stored.size) - 1)])
        sizes = stored.size if place.layer is None else torch.Size([1, *stored.size[1:]])
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = create_read_items_for_chunk_list(place.key, stored, [ChunkStorageMetadata(offsets, sizes)])
        try:
            self._reader.read_data(LoadPlan(wanted), _IntoTensor(target)).wait()
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.folder}: {place} cannot be read ({reason}); copy the checkpoint again") from error
        return target if place.layer is None else target[0]


class _IntoTensor(DefaultLoadPlanner):
    """Puts every piece that is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        slices = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in slices)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: `resolve_tensor` gave out a view."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter to be written; `make` is called when its turn comes."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_mcore(folder: Path, params: Sequence[Param], modules: Iterable[Place], num_layers: int) -> None:
    """Write a weights-only checkpoint. `modules` are those that have an extra state of their own, empty here."""
    states = [_extra_state_key(module, num_layers) for module in modules]
    planner = _OneByOne(params, states, num_layers)
    dcp.save({}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    torch.save({}, folder / "common.pt")
    save_config(FORMAT, str(folder))


def _extra_state_key(module: Place, num_layers: int) -> str:
    index, count = (0, 1) if module.layer is None else (module.layer, num_layers)
    return f"{module.key}._extra_state/shard_{index}_{count}"


class _OneByOne(DefaultSavePlanner):
    """Plans from shapes alone and makes each tensor when the writer asks for it."""

    def __init__(self, params: Sequence[Param], states: Sequence[str], num_layers: int):
        super().__init__(flatten_state_dict=False)
        items = [_tensor_item(param, num_layers) for param in params]
        self._make = {item.index: param.make for item, param in zip(items, params, strict=True)}
        self._items = [*items, *(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in states)]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        assert write_item.tensor_data is not None, "all others are bytes"
        shape = write_item.tensor_data.chunk.sizes
        return self._make[write_item.index]().view(shape)


def _tensor_item(param: Param, num_layers: int) -> WriteItem:
    layer = param.place.layer
    stack = () if layer is None else (num_layers,)
    row = () if layer is None else (1,)
    offsets = torch.Size([*(() if layer is None else (layer,)), *[0] * len(param.shape)])
    chunk = ChunkStorageMetadata(offsets, torch.Size([*row, *param.shape]))
    data = TensorWriteData(chunk, TensorProperties(dtype=param.dtype), torch.Size([*stack, *param.shape]))
    return WriteItem(MetadataIndex(param.place.key, offsets), WriteItemType.SHARD, tensor_data=data)
