# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder holds: names, shapes and dtypes; the trained weights themselves are not read."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from checkpoint_tools.console import size_text
from checkpoint_tools.folders import HF_MARK, find_mcore, folder_bytes
from checkpoint_tools.intact import check_files
from checkpoint_tools.mcore_to_hf import dtype_name
from checkpoint_tools.weights import McoreWeights, hf_dtype
from model_providers.family import read_config
from model_providers.hf_checkpoint import HfCheckpoint
from model_providers.hf_files import INDEX_FILE, SINGLE_FILE

OPTIMIZER = "optimizer."  # its tensors stand in a Megatron file beside the weights
WIDTH = 140  # of the table where no terminal says otherwise


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are alike: one per layer, under one name with `*` for the index."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_parameters(self) -> int:
        return self.count * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Summary:
    folder: str
    kind: str
    model_type: str
    step: int | None
    num_parameters: int
    """Of the model: without the padding of the vocabulary that a Megatron file holds."""
    bytes: int
    optimizer: bool
    groups: tuple[TensorGroup, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def inspect(folder: Path) -> Summary:
    if (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file():
        return _inspect_hf(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; give that of a checkpoint")
    return _inspect_mcore(find_mcore(folder, "DIR"))


def _inspect_hf(folder: Path) -> Summary:
    checkpoint = HfCheckpoint(folder)
    groups = _group((name, checkpoint.shape(name), hf_dtype(checkpoint, name)) for name in checkpoint.names())
    return Summary(
        folder=str(folder),
        kind="Hugging Face",
        model_type=_model_type(folder),
        step=None,
        num_parameters=sum(group.num_parameters for group in groups),
        bytes=folder_bytes(folder),
        optimizer=False,
        groups=tuple(groups),
    )


def _inspect_mcore(folder: Path) -> Summary:
    check_files(folder)
    weights = McoreWeights(folder)
    stored = weights.file.tensors
    trained = [
        (key, tuple(stored[key].size), stored[key].properties.dtype) for key in sorted(stored) if _is_weight(key)
    ]
    frozen = [
        (f"hf/{name}", weights.shape(name), weights.dtype(name))
        for name in weights.frozen_names()
        if not weights.holds_trained(name)
    ]
    state = folder / "state.json"
    return Summary(
        folder=str(folder),
        kind="Megatron",
        model_type=_model_type(folder / "hf"),
        step=json.loads(state.read_text(encoding="utf-8"))["step"] if state.is_file() else None,
        num_parameters=sum(torch.Size(weights.shape(name)).numel() for name in weights.names()),
        bytes=folder_bytes(folder),
        optimizer=not all(map(_is_weight, stored)),
        groups=tuple(_group([*trained, *frozen])),
    )


def _is_weight(key: str) -> bool:
    return not key.startswith(OPTIMIZER)


def _model_type(folder: Path) -> str:
    return read_config(folder, "DIR").get("model_type") or "" if (folder / HF_MARK).is_file() else ""


def _group(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> list[TensorGroup]:
    counts: dict[tuple[str, tuple[int, ...], str], int] = defaultdict(int)
    for name, shape, dtype in tensors:
        counts[re.sub(r"\.\d+\.", ".*.", name), shape, dtype_name(dtype)] += 1
    return [TensorGroup(name, count, shape, dtype) for (name, shape, dtype), count in counts.items()]


def show(summary: Summary) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    step = "" if summary.step is None else f", step {summary.step}"
    state = "with optimizer state" if summary.optimizer else "weights only"
    kind = f"{summary.kind} checkpoint{step}" + (f", {state}" if summary.kind == "Megatron" else "")
    console.print(f"{summary.folder}: {kind}", soft_wrap=True)
    size = f"{summary.num_parameters:,} parameters, {size_text(summary.bytes)} on disk"
    console.print(f"{summary.model_type or 'unknown model'}, {size}", soft_wrap=True)
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "count", "parameters")
    for group in summary.groups:
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.name, shape, group.dtype, str(group.count), f"{group.num_parameters:,}")
    console.print(table)
