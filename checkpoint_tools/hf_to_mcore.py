# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folder -> a weights-only Megatron checkpoint, for `model.weights_from` at any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.console import follow
from checkpoint_tools.digests import write_digests
from checkpoint_tools.folders import folder_bytes, new_folder
from checkpoint_tools.frozen import copy_frozen_parts
from checkpoint_tools.mcore_file import Param, Place, place_of, write_mcore
from checkpoint_tools.weights import full_shard, fuse, hf_dtype, stored_entries
from megatron_rl.errors import WeightMismatch, raise_all
from megatron_rl.runtime.grid import Grid
from model_providers.hf_checkpoint import HfCheckpoint
from model_providers.hf_files import tied_copy_problem
from model_providers.provider import open_provider
from model_providers.shape import TransformerShape
from model_providers.weight_map import Entry


def hf_to_mcore(hf: Path, out: Path, tensor: int = 1, pipeline: int = 1, force: bool = False) -> dict[str, object]:
    """Write `out`; the sizes are only checked against the model, since the file does not depend on them."""
    provider = open_provider(hf)
    raise_all(size_problems(provider.shape, tensor, pipeline), f"layout of {hf}")
    checkpoint = HfCheckpoint(hf)
    entries = stored_entries(provider.weight_map)
    checkpoint.check({t.name: t.shape for t in provider.weight_map.hf_tensors().values()})
    dtypes = _dtypes(entries, checkpoint)
    if provider.shape.tied_embeddings:
        _check_tied_copy(checkpoint, provider.weight_map["output_layer.weight"].hf[0].name)
    with new_folder(out, hf, force) as folder:
        copy_frozen_parts(hf, folder / "hf")
        steps = iter(follow(range(len(entries)), len(entries), "writing"))
        params = [
            Param(
                place_of(entry.mcore),
                full_shard(entry).shape,
                dtypes[entry.mcore],
                partial(_make, entry, dtypes[entry.mcore], checkpoint, steps),
            )
            for entry in entries
        ]
        write_mcore(folder, params, _modules_with_state(entries), provider.shape.num_layers)
        next(steps, None)
        write_digests(folder, {})
    num_parameters = sum(t.rows * t.cols for entry in entries for t in entry.hf)
    return {"out": str(out), "num_parameters": num_parameters, "num_tensors": len(params), "bytes": folder_bytes(out)}


def size_problems(shape: TransformerShape, tensor: int, pipeline: int) -> list[str]:
    """Why the model cannot be loaded with these sizes."""
    grid = Grid(max(1, tensor * pipeline), tensor=tensor, pipeline=pipeline)
    return [problem.told("--", {"tensor": "tp", "pipeline": "pp"}) for problem in grid.problems(shape)]


def _make(entry: Entry, dtype: torch.dtype, checkpoint: HfCheckpoint, steps: Iterator[int]) -> Tensor:
    next(steps)
    return fuse(entry, dtype, checkpoint)


def _dtypes(entries: list[Entry], checkpoint: HfCheckpoint) -> dict[str, torch.dtype]:
    """{Megatron name: dtype}. A tensor of the file, which stacks the layers, has one."""
    by_key: dict[str, set[torch.dtype]] = defaultdict(set)
    for entry in entries:
        by_key[place_of(entry.mcore).key] |= {hf_dtype(checkpoint, t.name) for t in entry.hf}
    mixed = [f"{key}: {', '.join(sorted(map(str, found)))}" for key, found in by_key.items() if len(found) > 1]
    if mixed:
        listed = "\n  ".join(mixed)
        raise WeightMismatch(
            f"{checkpoint.folder}: dtypes differ within what Megatron-core fuses; save it in one:\n  {listed}"
        )
    return {entry.mcore: next(iter(by_key[place_of(entry.mcore).key])) for entry in entries}


def _check_tied_copy(checkpoint: HfCheckpoint, embedding: str) -> None:
    problem = tied_copy_problem(checkpoint.folder, checkpoint.stored, embedding)
    if problem:
        raise WeightMismatch(problem)


def _modules_with_state(entries: list[Entry]) -> list[Place]:
    """Modules that have an (empty) extra state in a checkpoint: every linear layer and the last norm.

    Only a model on a GPU asks for the norm's, since Transformer Engine's norms have one and local norms do not.
    """
    places = dict.fromkeys(
        place_of(entry.mcore.rpartition(".")[0])
        for entry in entries
        if ".linear_" in entry.mcore or entry.mcore.startswith("decoder.final_layernorm.")
    )
    return list(places)
