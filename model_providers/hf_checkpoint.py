# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face checkpoints (one file or many, safetensors only) slice by slice, so that a rank reads its
shard only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rl.errors import WeightMismatch
from model_providers.weight_map import Block, WeightMap

if TYPE_CHECKING:
    from megatron_rl.runtime.parallel import ParallelMesh
    from model_providers.transformer import ChunkedStage, LanguageModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# transformers 5 names the same tensors differently in memory and, in some releases, on disk.
_ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))


def canonical_hf_name(key: str) -> str:
    for prefix, replacement in _ALIASES:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


class HfCheckpoint:
    """`folder`'s tensors by canonical HF name. Nothing is read before it is asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = _tensor_files(self.folder)
        self._keys = {canonical_hf_name(key): key for key in self._files}
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._keys)

    def tensor(self, name: str) -> Tensor:
        return self._handle(name).get_tensor(self._keys[name])

    def part(self, name: str, rows: slice, cols: slice) -> Tensor:
        """Rows and columns of a tensor as [rows, cols]; a vector has one column."""
        view = self._handle(name).get_slice(self._keys[name])
        return view[rows].unsqueeze(1) if len(view.get_shape()) == 1 else view[rows, cols]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(self._keys[name]).get_shape())

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one WeightMismatch that lists every missing and every misshapen tensor of {name: shape}."""
        problems = []
        for name, shape in wanted.items():
            if name not in self._keys:
                problems.append(f"{name}: missing, expected shape {list(shape)}")
            elif self.shape(name) != shape:
                problems.append(f"{name}: shape {list(self.shape(name))}, expected {list(shape)}")
        if problems:
            listed = "\n  ".join(problems)
            raise WeightMismatch(f"{self.folder} does not hold the weights its config.json describes:\n  {listed}")

    def _handle(self, name: str) -> Any:
        file = self._files[self._keys[name]]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the single file."""
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        missing = sorted({file for file in index.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder}: {INDEX_FILE} names files that are not there: {missing}; download them again")
        return dict(index)
    if (folder / SINGLE_FILE).is_file():
        with safe_open(folder / SINGLE_FILE, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), SINGLE_FILE)
    raise ValueError(f"{folder}: holds neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors checkpoints are read")


@torch.no_grad()
def load_shard(target: Tensor, blocks: Iterable[Block], checkpoint: HfCheckpoint) -> None:
    """Fill a local parameter from the HF rectangles of its Shard; what no block covers (vocabulary padding) is zero."""
    local = target.zero_().unsqueeze(1) if target.ndim == 1 else target.zero_()
    for block in blocks:
        local[block.local_slices].copy_(checkpoint.part(block.hf, *block.hf_slices))


def load_stage(
    model: LanguageModel | ChunkedStage, weights: WeightMap, checkpoint: HfCheckpoint, mesh: ParallelMesh
) -> None:
    """Fill a pipeline stage with its part of the HF weights, reading only that part."""
    checkpoint.check({t.name: t.shape for t in weights.hf_tensors().values()})
    for name, param in model.named_weights().items():
        entry = weights[name]
        shard = entry.layout.trainer(entry.hf, *mesh.slot(entry.layout.is_expert))
        assert shard.shape == tuple(param.shape), f"{name}: built {tuple(param.shape)}, table says {shard.shape}"
        load_shard(param, shard.blocks, checkpoint)
