# SPDX-License-Identifier: Apache-2.0
"""Save and load training state with Megatron-core's dist_checkpointing: any layout writes, any other reads.

    <root>/step_12/            complete, or it is not there: written as step_12.partial and renamed at the end
        *.distcp, common.pt    model and optimizer (Megatron-core's format)
        state.json             step, loader position, best metric ...
        rng/rank_0.safetensors random number generators of each rank
        digests.json           size and sha256 of every file
        hf/                    config, tokenizer, and what is not trained: what an export needs besides

Old checkpoints go only after a newer one is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint_tools.digests import FileDigest, digest_of, read_digests, write_digests
from checkpoint_tools.frozen import copy_frozen_parts
from checkpoint_tools.intact import problems_of_files
from checkpoint_tools.origin import changes_since
from megatron_rl.errors import raise_all
from megatron_rl.protocols import MediaEncoder
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.parallel import ParallelMesh, gather_lists
from megatron_rl.training.checkpoint_writer import RankSave, bytes_to_write
from megatron_rl.training.encoder_training import encoder_state, load_encoder_state
from megatron_rl.training.policy import Policy

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
STATE_FILE = "state.json"
HF_FOLDER = "hf"


def list_steps(root: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `root`, ascending."""
    names = (re.fullmatch(r"step_(\d+)", p.name) for p in Path(root).glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def step_folder(root: str | Path, step: int) -> Path:
    return Path(root) / f"step_{step}"


def remove_leftovers(root: str | Path) -> None:
    """What saves that did not end have left. Only for the one job that holds the run folder; on rank 0."""
    for partial in Path(root).glob("step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def save(
    root: str | Path, step: int, policy: Policy, mesh: ParallelMesh, state: Mapping[str, Any], hf_source: str
) -> Path:
    """Write `step_<step>`; collective. A crash at any moment leaves every earlier checkpoint as it was.

    Raises ValueError on all ranks where it cannot be written (disk full ...); then nothing is left of it.
    """
    final = step_folder(root, step)
    partial = final.with_name(final.name + ".partial")
    vision = {"vision": vision_of(policy.media_encoder)} if holds_encoder(policy.media_encoder) else {}
    whole = {"step": step, "version": policy.version, **vision, **state}
    try:
        _save(final, partial, policy, mesh, whole, Path(hf_source))
    except ValueError:
        shutil.rmtree(
            partial, ignore_errors=True
        )  # on every rank: another may still have been writing at the first try
        raise
    return final


def _save(
    final: Path, partial: Path, policy: Policy, mesh: ParallelMesh, state: Mapping[str, Any], hf_source: Path
) -> None:
    rng = f"rng/rank_{mesh.rank}.safetensors"
    known: dict[str, FileDigest] = {}
    if mesh.rank == 0:
        remove_leftovers(final.parent)
    with _told_to_all(final):
        if mesh.rank == 0:
            (partial / "rng").mkdir(parents=True)
            known = _link_hf_files(hf_source, partial / HF_FOLDER, previous=_newest(final.parent))
    known |= _save_tensors(final, partial, policy)
    with _told_to_all(final):
        save_file({"torch": torch.get_rng_state()}, partial / rng)
        known[rng] = digest_of(partial / rng)
    known = dict(gather_lists(list(known.items())))
    with _told_to_all(final):
        if mesh.rank == 0:
            write_atomically(partial / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())
            write_digests(partial, known)
            _flush(partial)
            _remove(final)
            partial.rename(final)


def _save_tensors(final: Path, partial: Path, policy: Policy) -> dict[str, FileDigest]:
    """Model and optimizer; returns the digests of the files that this rank has written. Collective."""
    writer = RankSave()
    with policy.optimizer_on_device():
        for part in policy.optimizer.chained_optimizers:
            # Moments exist from the first update on (none is made with rollout.only), but are always written.
            part.init_state_fn(part.optimizer, part.config)
        state = _sharded_state(policy, is_loading=False)
        _check_space(final, partial, sum(gather_lists([bytes_to_write(state)])))
        try:
            dist_checkpointing.save(state, str(partial), sharded_strategy=writer)
        except CheckpointException as error:
            first = next(iter(error.failures.values()), (error, None))[0]
            raise ValueError(_not_written(final, str(first))) from error
        except (OSError, RuntimeError) as error:  # rank 0 alone: of common.pt and .metadata
            raise ValueError(_not_written(final, f"a file of rank 0 failed ({error})")) from error
    return writer.written


def _check_space(final: Path, partial: Path, needed: int) -> None:
    """Raise ValueError on all ranks where the disk of any has not `needed` bytes left."""
    free = min(gather_lists([shutil.disk_usage(partial).free]))
    if free < needed:
        raise ValueError(_not_written(final, f"it takes {needed:,} bytes, {free:,} are free on its disk"))


@contextmanager
def _told_to_all(final: Path) -> Iterator[None]:
    """An OSError of the block on any rank ends in the same ValueError on all. Collective."""
    reason = ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error)
    reasons = [found for found in gather_lists([reason]) if found]
    if reasons:
        raise ValueError(_not_written(final, reasons[0]))


def _not_written(final: Path, why: str) -> str:
    free = shutil.disk_usage(final.parent).free
    room = "" if "free on its disk" in why else f"; {free:,} bytes are free on its disk"
    fix = "make room, or take another run_dir, and give the same command again"
    return f"{final} cannot be written: {why}{room}; earlier checkpoints are whole; {fix}"


def load(folder: str | Path, policy: Policy, mesh: ParallelMesh) -> dict[str, Any]:
    """Restore model, optimizer and random state; returns what `save` was given as `state`, with step and version.

    Every file is compared with its digest first. Raises ValueError on all ranks. Collective.
    """
    folder = Path(folder)
    problems = gather_lists(problems_of_files(folder, dist.get_rank(), dist.get_world_size()))
    if problems:
        raise ValueError(_not_read(folder, problems))
    state = json.loads((folder / STATE_FILE).read_text())
    _check_same_vision(state.pop("vision", None), policy.media_encoder)
    with policy.optimizer_on_device():
        loaded = _load_tensors(_sharded_state(policy, is_loading=True), folder)
        policy.language_model.load_state_dict(loaded["model"])
        if "tower" in loaded and policy.media_encoder is not None:
            load_encoder_state(policy.media_encoder, loaded["tower"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    rng = folder / "rng" / f"rank_{mesh.rank}.safetensors"
    if rng.is_file():  # a larger world has ranks that were not there; nothing they draw is used across a resume
        torch.set_rng_state(load_file(rng)["torch"])
    policy.version = state["version"]
    return state


def _load_tensors(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:
        reasons = dict.fromkeys(f"{type(e).__name__}: {e}" for e, _ in error.failures.values())
        raise ValueError(_not_read(folder, list(reasons))) from error


def _not_read(folder: Path, problems: Sequence[str]) -> str:
    match = re.fullmatch(r"step_(\d+)", folder.name)
    earlier = [step for step in list_steps(folder.parent) if match and step < int(match[1])]
    go_on = f"go on from step_{earlier[-1]}" if earlier else "start again"
    return f"{folder} cannot be read ({'; '.join(dict.fromkeys(problems))}); remove it to {go_on}"


def check_origin(folder: Path, hf: Path, origin: Mapping[str, str]) -> None:
    """Raise one ValueError on all ranks where the run that wrote `folder` began with another model. `origin` counts on
    rank 0. Collective."""
    problems: list[str] = []
    if dist.get_rank() == 0:
        try:
            saved = json.loads((folder / STATE_FILE).read_text()).get("origin", {})
            problems = list(changes_since(folder / HF_FOLDER, saved, hf, origin))
        except (OSError, ValueError, SafetensorError) as error:
            problems = [_not_read(folder, [str(error)])]
    raise_all(gather_lists(problems), f"resume from {folder}")


def vision_of(media_encoder: MediaEncoder | None) -> list[str] | None:
    """What a checkpoint says of the tower that it holds: the parts that were trained."""
    return sorted(media_encoder.trained) if holds_encoder(media_encoder) else None


def holds_encoder(media_encoder: MediaEncoder | None) -> TypeGuard[MediaEncoder]:
    """Whether a checkpoint must hold the tower: the Hugging Face folder has other weights."""
    return media_encoder is not None and not media_encoder.is_original


def _check_same_vision(saved: list[str] | None, media_encoder: MediaEncoder | None) -> None:
    ours = vision_of(media_encoder)
    if saved != ours:
        was, now = (
            f"its own tower, of which {v or 'nothing'} is trained" if v is not None else "that of model.hf"
            for v in (saved, ours)
        )
        raise ValueError(
            f"model.freeze_vision: the checkpoint was made with {was}; this run has {now}; use the same settings, or "
            "start a new run_dir with model.weights_from"
        )


def check_weights(folder: str | Path) -> None:
    """Raise one ValueError on all ranks with every file of `model.weights_from` that is damaged or would run foreign
    code. Collective."""
    path = find_start(folder)
    problems = gather_lists(problems_of_files(path, dist.get_rank(), dist.get_world_size()))
    if problems:
        why = "; ".join(dict.fromkeys(problems))
        raise ValueError(f"model.weights_from={path}: cannot be read ({why}); copy it again, or take another")


def load_weights(folder: str | Path, policy: Policy) -> None:
    """Start from the model weights of a checkpoint: of one `step_N`, or of the newest in a folder of them. The tower
    has a function of its own. `check_weights` comes first."""
    with policy.backend.mcore_scope():
        loaded = _load_tensors({"model": policy.language_model.sharded_state_dict()}, find_start(folder))
        policy.language_model.load_state_dict(loaded["model"])
    weights = policy.language_model.named_weights()
    not_finite = sorted(set(gather_lists([name for name, param in weights.items() if not param.isfinite().all()])))
    if not_finite:
        why = f"NaN or infinity in {', '.join(not_finite[:3])}" + (" ..." if len(not_finite) > 3 else "")
        raise ValueError(f"model.weights_from={folder}: {why}; take an earlier checkpoint of that run")
    policy.optimizer.reload_model_params()


def load_encoder(folder: str | Path, media_encoder: MediaEncoder) -> None:
    """As `load_weights`, for the vision tower; it stays that of `model.hf` where the checkpoint holds none."""
    path, state = find_start(folder), encoder_state(media_encoder)
    if state.keys() <= dist_checkpointing.load_tensors_metadata(str(path)).keys():
        load_encoder_state(media_encoder, _load_tensors({"tower": state}, path)["tower"])


def find_start(folder: str | Path) -> Path:
    """The `step_N` that `model.weights_from` stands for. Raises ValueError."""
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
            _remove(step_folder(root, step))


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill meanwhile leaves what `remove_leftovers` removes, and none that is half there."""
    if folder.is_dir():
        partial = folder.with_name(folder.name + ".old.partial")
        folder.rename(partial)
        shutil.rmtree(partial)


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": policy.language_model.sharded_state_dict()}
    if holds_encoder(policy.media_encoder):
        state["tower"] = encoder_state(policy.media_encoder)
    optimizer = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
    return {**state, "optimizer": optimizer}


def _newest(root: str | Path) -> Path | None:
    steps = list_steps(root)
    return step_folder(root, steps[-1]) if steps else None


def _link_hf_files(source: Path, target: Path, previous: Path | None) -> dict[str, FileDigest]:
    """What an export needs besides the trained weights. Hard links to the previous checkpoint's copy cost no space; the
    digests of its files, by their path in the checkpoint, are returned."""
    if previous is None or not (previous / HF_FOLDER).is_dir():
        copy_frozen_parts(source, target)
        return {}
    shutil.copytree(previous / HF_FOLDER, target, copy_function=os.link)
    digests = read_digests(previous) or {}
    return {name: digest for name, digest in digests.items() if name.startswith(f"{HF_FOLDER}/")}


def _flush(folder: Path) -> None:
    """Push the files to the disk before the rename makes them official."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
