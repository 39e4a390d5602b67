# SPDX-License-Identifier: Apache-2.0
"""Between Hugging Face tensors and Megatron parameters, one parameter at a time, through the family's weight table.

The file of a checkpoint is what a single rank would hold: every layout is asked for rank 0 of 1.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint_tools.frozen import FROZEN_FILE
from checkpoint_tools.mcore_file import McoreFile, Place, place_of
from megatron_rl.errors import WeightMismatch
from model_providers.hf_checkpoint import HfCheckpoint, load_shard
from model_providers.hf_files import HEAD
from model_providers.provider import open_provider
from model_providers.weight_map import Entry, Shard, Vocab, WeightMap


def stored_entries(weight_map: WeightMap) -> list[Entry]:
    """The entries that a file holds: an output layer tied to the embedding is not written again."""
    entries: dict[tuple[str, ...], Entry] = {}
    for entry in weight_map.entries.values():
        entries.setdefault(tuple(t.name for t in entry.hf), entry)
    return list(entries.values())


def full_shard(entry: Entry) -> Shard:
    return entry.layout.trainer(entry.hf, 0, 1)


def fuse(entry: Entry, dtype: torch.dtype, checkpoint: HfCheckpoint) -> Tensor:
    """The whole Megatron parameter from its HF tensors; vocabulary padding is zero."""
    shard = full_shard(entry)
    parameter = torch.empty(shard.shape, dtype=dtype)
    load_shard(parameter, shard.blocks, checkpoint)
    return parameter


def split(entry: Entry, parameter: Tensor) -> dict[str, Tensor]:
    """The HF tensors that a whole Megatron parameter is made of; vocabulary padding is dropped."""
    local = parameter if parameter.ndim == 2 else parameter[:, None]
    tensors = {t.name: torch.empty(t.rows, t.cols, dtype=parameter.dtype) for t in entry.hf}
    for block in full_shard(entry).blocks:
        tensors[block.hf][block.hf_slices] = local[block.local_slices]
    return {t.name: tensors[t.name].view(t.shape) for t in entry.hf}


def hf_dtype(checkpoint: HfCheckpoint, name: str) -> torch.dtype:
    shape = checkpoint.shape(name)
    if len(shape) in (1, 2):
        return checkpoint.part(name, slice(0, 1), slice(0, 1)).dtype
    return checkpoint.tensor(name).dtype


class McoreWeights:
    """A Megatron checkpoint folder as the Hugging Face tensors that it stands for, trained and frozen."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.provider = open_provider(folder / "hf")
        self.file = McoreFile(folder)
        entries = stored_entries(self.provider.weight_map)
        self._entry = {t.name: entry for entry in entries for t in entry.hf}
        self._shape = {t.name: t.shape for entry in entries for t in entry.hf}
        self._frozen = safe_open(folder / "hf" / FROZEN_FILE, framework="pt")
        self._tied_to = self._tied_embedding()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def check(self) -> None:
        """Raise one WeightMismatch that lists every missing and every misshapen parameter."""
        problems = list(self.problems.values())
        if problems:
            raise WeightMismatch(
                "\n  ".join([f"{self.folder} does not hold the weights its hf/config.json describes:", *problems])
            )

    @cached_property
    def problems(self) -> dict[str, str]:
        """{Megatron name: what is wrong}."""
        found = {}
        for entry in dict.fromkeys(self._entry.values()):
            place, wanted = place_of(entry.mcore), full_shard(entry).shape
            shape = self.file.shape(place)
            if shape is None:
                found[entry.mcore] = f"{place}: missing, expected shape {list(wanted)}"
            elif not _fits(entry, shape, wanted):
                found[entry.mcore] = f"{place}: shape {list(shape)}, expected {list(wanted)}"
        return found

    def names(self) -> list[str]:
        """HF names; the tensors of one parameter are neighbours, so that reading in this order reads it once."""
        return [*self._entry, *self.frozen_names()]

    def frozen_names(self) -> list[str]:
        return list(self._frozen.keys())

    def holds_trained(self, name: str) -> bool:
        """Whether a tensor outside the weight table (of the vision tower) was trained: then the file has it, under its
        HF name, and what `hf/` holds is what it began as."""
        return self.file.shape(Place(name)) is not None

    def is_readable(self, name: str) -> bool:
        """Whether the parameter that holds this tensor is there and has its shape."""
        name = self._tied_to.get(name, name)
        return name not in self._entry or self._entry[name].mcore not in self.problems

    def shape(self, name: str) -> tuple[int, ...]:
        name = self._tied_to.get(name, name)
        if name in self._shape:
            return self._shape[name]
        return self.file.shape(Place(name)) or tuple(self._frozen.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        name = self._tied_to.get(name, name)
        if name in self._entry:
            return self.file.dtype(place_of(self._entry[name].mcore))
        if self.holds_trained(name):
            return self.file.dtype(Place(name))
        return self._frozen.get_tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        if name in self._tied_to:
            return self.tensor(self._tied_to[name]).clone()
        if name not in self._entry:
            return self.file.read(Place(name)) if self.holds_trained(name) else self._frozen.get_tensor(name)
        entry = self._entry[name]
        if self._last[0] != entry.mcore:
            self._last = (entry.mcore, split(entry, self.file.read(place_of(entry.mcore))))
        return self._last[1][name]

    def _tied_embedding(self) -> dict[str, str]:
        """A second copy of the embedding follows the trained one."""
        if not self.provider.shape.tied_embeddings or HEAD not in self.frozen_names():
            return {}
        return {HEAD: self.provider.weight_map["output_layer.weight"].hf[0].name}


def _fits(entry: Entry, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if isinstance(entry.layout, Vocab):  # tensor parallel sizes that do not divide 128 pad further
        return len(shape) == 2 and shape[0] >= entry.hf[0].rows and shape[1] == wanted[1]
    return shape == wanted


def different_bits(a: Tensor, b: Tensor) -> Tensor:
    """bool [numel]: which elements of two tensors of one shape and dtype differ; judged by their bits."""
    return (_as_bytes(a) != _as_bytes(b)).any(1)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1).view(torch.uint8)
