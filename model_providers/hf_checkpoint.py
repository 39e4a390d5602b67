# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face checkpoints (one file or many, safetensors only) slice by slice, so that a rank reads its
shard only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rl.errors import WeightMismatch
from megatron_rl.runtime.parallel import gather_lists
from model_providers.hf_files import misfits, read_tensor_files
from model_providers.weight_map import Block, WeightMap

if TYPE_CHECKING:
    from megatron_rl.runtime.parallel import ParallelMesh
    from model_providers.transformer import ChunkedStage, LanguageModel


class HfCheckpoint:
    """`folder`'s tensors by canonical HF name. Nothing is read before it is asked for."""

    def __init__(self, folder: str | Path):
        """Raises ValueError that names every file that is cut, damaged, missing or not what the index says."""
        self.folder = Path(folder)
        self.stored = read_tensor_files(self.folder)
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self.stored)

    def tensor(self, name: str) -> Tensor:
        return self._handle(name).get_tensor(self.stored[name].key)

    def part(self, name: str, rows: slice, cols: slice) -> Tensor:
        """Rows and columns of a tensor as [rows, cols]; a vector has one column."""
        view = self._handle(name).get_slice(self.stored[name].key)
        return view[rows].unsqueeze(1) if len(view.get_shape()) == 1 else view[rows, cols]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raise one WeightMismatch that lists the missing and the misshapen tensors of {name: shape}."""
        problems = misfits(self.stored, wanted)
        if problems:
            listed = "\n  ".join(problems)
            raise WeightMismatch(f"{self.folder} does not hold the weights its config.json describes:\n  {listed}")

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise one ValueError that lists those of {name: tensor} that hold NaN or infinity."""
        self.refuse([name for name, tensor in tensors.items() if not tensor.isfinite().all()])

    def refuse(self, not_finite: Sequence[str]) -> None:
        """Raise ValueError if there are names of tensors that hold NaN or infinity."""
        if not_finite:
            more = f" and {len(not_finite) - 3} more" if len(not_finite) > 3 else ""
            names = ", ".join(f"{name} ({self.stored[name].file})" for name in not_finite[:3])
            raise ValueError(
                f"{self.folder}: {names}{more}: NaN or infinity among the weights; download them again, or take an "
                "earlier checkpoint of the run that wrote them"
            )

    def _handle(self, name: str) -> Any:
        file = self.stored[name].file
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]


@torch.no_grad()
def load_shard(target: Tensor, blocks: Iterable[Block], checkpoint: HfCheckpoint) -> None:
    """Fill a local parameter from the HF rectangles of its Shard; what no block covers (vocabulary padding) is zero."""
    local = target.zero_().unsqueeze(1) if target.ndim == 1 else target.zero_()
    for block in blocks:
        local[block.local_slices].copy_(checkpoint.part(block.hf, *block.hf_slices))


def load_stage(
    model: LanguageModel | ChunkedStage, weights: WeightMap, checkpoint: HfCheckpoint, mesh: ParallelMesh
) -> None:
    """Fill a pipeline stage with its part of the HF weights, reading only that part. Collective.

    Raises ValueError on all ranks where weights are missing, misshapen or not finite on any.
    """
    checkpoint.check({t.name: t.shape for t in weights.hf_tensors().values()})
    not_finite: list[str] = []
    for name, param in model.named_weights().items():
        entry = weights[name]
        shard = entry.layout.trainer(entry.hf, *mesh.slot(entry.layout.is_expert))
        assert shard.shape == tuple(param.shape), f"{name}: built {tuple(param.shape)}, table says {shard.shape}"
        load_shard(param, shard.blocks, checkpoint)
        if not param.isfinite().all():
            parts = {block.hf: checkpoint.part(block.hf, *block.hf_slices) for block in shard.blocks}
            not_finite += [hf for hf, part in parts.items() if not part.isfinite().all()]
    checkpoint.refuse(sorted(set(gather_lists(not_finite))))
