# SPDX-License-Identifier: Apache-2.0
"""Save and load training state with Megatron-core's dist_checkpointing: any layout writes, any other reads.

    <root>/step_12/            complete, or it is not there: written as step_12.partial and renamed at the end
        *.distcp, common.pt    model and optimizer (Megatron-core's format)
        state.json             step, loader position, best metric ...
        rng/rank_0.safetensors random number generators of each rank
        hf/                    config, tokenizer, and what is not trained: what an export needs besides

Old checkpoints go only after a newer one is complete.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file, save_file

from megatron_rl.protocols import MediaEncoder
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.policy import Policy
from megatron_rl.training.tower import load_tower_state, tower_state

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
STATE_FILE = "state.json"
HF_FOLDER = "hf"


def list_steps(root: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `root`, ascending."""
    names = (re.fullmatch(r"step_(\d+)", p.name) for p in Path(root).glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def step_folder(root: str | Path, step: int) -> Path:
    return Path(root) / f"step_{step}"


def save(
    root: str | Path, step: int, policy: Policy, mesh: ParallelMesh, state: Mapping[str, Any], hf_source: str
) -> Path:
    """Write `step_<step>`; collective. A crash at any moment leaves every earlier checkpoint as it was."""
    final = step_folder(root, step)
    partial = final.with_name(final.name + ".partial")
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "rng").mkdir(parents=True)
        _link_hf_files(Path(hf_source), partial / HF_FOLDER, previous=_newest(root))
    dist.barrier()
    collect_write_results_in_process()
    with policy.optimizer_at_hand():
        for part in policy.optimizer.chained_optimizers:
            # Moments exist from the first update on (none is made with rollout.only), but are always written.
            part.init_state_fn(part.optimizer, part.config)
        dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(partial))
    save_file({"torch": torch.get_rng_state()}, partial / "rng" / f"rank_{mesh.rank}.safetensors")
    dist.barrier()
    if mesh.rank == 0:
        vision = {"vision": vision_of(policy.tower)} if holds_tower(policy.tower) else {}
        whole = {"step": step, "version": policy.version, **vision, **state}
        write_atomically(partial / STATE_FILE, (json.dumps(whole, indent=2) + "\n").encode())
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()
    return final


def collect_write_results_in_process() -> None:
    """Give Megatron-core 0.16.1's checkpoint writer a plain queue for its results.

    Its own is made by a manager process: seconds to start, needed by asynchronous saves only, and left behind for ever
    when a rank is killed.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load(folder: str | Path, policy: Policy, mesh: ParallelMesh) -> dict[str, Any]:
    """Restore model, optimizer and random state; returns what `save` was given as `state`, with step and version."""
    state = json.loads((Path(folder) / STATE_FILE).read_text())
    _check_same_vision(state.pop("vision", None), policy.tower)
    with policy.optimizer_at_hand():
        loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(folder))
        policy.language_model.load_state_dict(loaded["model"])
        if "tower" in loaded and policy.tower is not None:
            load_tower_state(policy.tower, loaded["tower"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    rng = Path(folder) / "rng" / f"rank_{mesh.rank}.safetensors"
    if rng.is_file():  # a larger world has ranks that were not there; nothing they draw is used across a resume
        torch.set_rng_state(load_file(rng)["torch"])
    policy.version = state["version"]
    return state


def vision_of(tower: MediaEncoder | None) -> list[str] | None:
    """What a checkpoint says of the tower that it holds: the parts that were trained."""
    return sorted(tower.trained) if holds_tower(tower) else None


def holds_tower(tower: MediaEncoder | None) -> TypeGuard[MediaEncoder]:
    """Whether a checkpoint must hold the tower: the Hugging Face folder has other weights."""
    return tower is not None and not tower.is_original


def _check_same_vision(saved: list[str] | None, tower: MediaEncoder | None) -> None:
    ours = vision_of(tower)
    if saved != ours:
        was, now = (
            f"its own tower, of which {v or 'nothing'} is trained" if v is not None else "that of model.hf"
            for v in (saved, ours)
        )
        raise ValueError(
            f"model.freeze_vision: the checkpoint was made with {was}; this run has {now}; use the same settings, or "
            "start a new run_dir with model.weights_from"
        )


def load_weights(folder: str | Path, policy: Policy) -> None:
    """Start from the model weights of a checkpoint: of one `step_N`, or of the newest in a folder of them. The tower
    has a function of its own."""
    path = _find(folder)
    with policy.backend.mcore_scope():
        loaded = dist_checkpointing.load({"model": policy.language_model.sharded_state_dict()}, str(path))
        policy.language_model.load_state_dict(loaded["model"])
    policy.optimizer.reload_model_params()


def load_tower(folder: str | Path, tower: MediaEncoder) -> None:
    """As `load_weights`, for the vision tower; it stays that of `model.hf` where the checkpoint holds none."""
    path, state = _find(folder), tower_state(tower)
    if state.keys() <= dist_checkpointing.load_tensors_metadata(str(path)).keys():
        load_tower_state(tower, dist_checkpointing.load({"tower": state}, str(path))["tower"])


def _find(folder: str | Path) -> Path:
    steps = list_steps(folder)
    path = step_folder(folder, steps[-1]) if steps else Path(folder)
    if not (path / "metadata.json").is_file():
        raise ValueError(f"model.weights_from={folder}: holds no checkpoint; give a step_N folder or a folder of them")
    return path


def prune(root: str | Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Call after a save is complete, on rank 0."""
    steps = list_steps(root)
    for step in steps[: max(0, len(steps) - keep)]:
        if step != best:
            shutil.rmtree(step_folder(root, step))


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": policy.language_model.sharded_state_dict()}
    if holds_tower(policy.tower):
        state["tower"] = tower_state(policy.tower)
    optimizer = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
    return {**state, "optimizer": optimizer}


def _newest(root: str | Path) -> Path | None:
    steps = list_steps(root)
    return step_folder(root, steps[-1]) if steps else None


def _link_hf_files(source: Path, target: Path, previous: Path | None) -> None:
    """What an export needs besides the trained weights. Hard links to the previous checkpoint's copy cost no space."""
    from checkpoint_tools.frozen import copy_frozen_parts

    if previous is not None and (previous / HF_FOLDER).is_dir():
        shutil.copytree(previous / HF_FOLDER, target, copy_function=os.link)
    else:
        copy_frozen_parts(source, target)


def _flush(folder: Path) -> None:
    """Push the files to the disk before the rename makes them official."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
