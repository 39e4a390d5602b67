# SPDX-License-Identifier: Apache-2.0
"""Megatron checkpoint of any layout -> a Hugging Face folder for transformers and vLLM, one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from checkpoint_tools.console import follow, write_json
from checkpoint_tools.folders import folder_bytes, new_folder
from checkpoint_tools.frozen import FROZEN_FILE
from checkpoint_tools.intact import check_files
from checkpoint_tools.weights import McoreWeights
from megatron_rl.runtime.files import written_atomically
from model_providers.hf_files import INDEX_FILE

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def mcore_to_hf(
    folder: Path, out: Path, dtype: str = "keep", max_shard_size: str = "5GB", force: bool = False
) -> dict[str, object]:
    """Write `out` from the checkpoint in `folder`."""
    check_files(folder)
    weights = McoreWeights(folder)
    weights.check()
    wanted = DTYPES[dtype]
    names = weights.names()
    dtypes = {name: wanted or weights.dtype(name) for name in names}
    shapes = {name: torch.empty(weights.shape(name), dtype=dtypes[name], device="meta") for name in names}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    with new_folder(out, folder, force) as scratch:
        _copy_small_files(folder / "hf", scratch)
        trained = dtypes[names[0]]
        _name_dtype(scratch / "config.json", trained)
        for file in follow(shards.filename_to_tensors, len(shards.filename_to_tensors), "writing"):
            _write_shard(scratch / file, shards.filename_to_tensors[file], weights, wanted)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(scratch / INDEX_FILE, index)
    return {
        "out": str(out),
        "from": str(folder),
        "num_parameters": sum(t.numel() for t in shapes.values()),
        "num_tensors": len(names),
        "num_files": len(shards.filename_to_tensors),
        "dtype": dtype_name(trained),
        "bytes": folder_bytes(out),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_shard(path: Path, names: Sequence[str], weights: McoreWeights, dtype: torch.dtype | None) -> None:
    tensors = {name: weights.tensor(name) for name in names}
    with written_atomically(path) as shard:
        save_file({name: t.to(dtype or t.dtype) for name, t in tensors.items()}, shard, metadata={"format": "pt"})
        shard.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read


def _copy_small_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name != FROZEN_FILE:
            shutil.copy2(path, target / path.name)


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make config.json say what the weights are: readers that are not told a dtype load in that one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    changed = [_set_dtype(part, dtype_name(dtype)) for part in places]
    if any(changed):
        write_json(path, config)


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    old = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) not in (None, name)}
    config |= dict.fromkeys(old, name)
    return bool(old)
