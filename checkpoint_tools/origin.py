# SPDX-License-Identifier: Apache-2.0
"""What a run began with, so that it never goes on with something else: the frozen parts would be those of another
model, and so would the reference of the KL term."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoint_tools.digests import DIGESTS_FILE
from checkpoint_tools.frozen import FROZEN_FILE
from checkpoint_tools.weights import different_bits
from model_providers.hf_checkpoint import HfCheckpoint

NO_WEIGHTS, UNKNOWN = "none", "unknown"


def origin_of(hf: Path, weights_from: Path | None) -> dict[str, str]:
    """What a checkpoint keeps of what its run began with. `weights_from` is a `step_N` folder."""
    start = NO_WEIGHTS
    if weights_from is not None:
        digests = weights_from / DIGESTS_FILE
        start = hashlib.sha256(digests.read_bytes()).hexdigest() if digests.is_file() else UNKNOWN
    return {"hf": fingerprint(HfCheckpoint(hf)), "weights_from": start, "weights_from_folder": str(weights_from or "")}


def fingerprint(checkpoint: HfCheckpoint) -> str:
    """sha256 of names, shapes and dtypes, and of three rows of each matrix: quick, and other weights differ there."""
    found = hashlib.sha256()
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        found.update(f"{name} {shape}".encode())
        whole = slice(None)
        rows = [slice(row, row + 1) for row in (0, shape[0] // 2, shape[0] - 1)] if len(shape) == 2 else []
        parts = [checkpoint.part(name, row, whole) for row in rows] or [checkpoint.tensor(name)]
        for part in parts:
            found.update(str(part.dtype).encode())
            found.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def changes_since(frozen: Path, saved: Mapping[str, str], hf: Path, now: Mapping[str, str]) -> Iterator[str]:
    """Why a run may not go on, one line a setting. `frozen` is the `hf` folder of its checkpoint, `saved` what
    `origin_of` gave when it began ({} in checkpoints of before there was one), `now` what it gives today."""
    changed = [*_changed_files(frozen, hf), *_changed_tensors(frozen, HfCheckpoint(hf))]
    if not changed and saved and saved["hf"] != now["hf"]:
        changed = ["weights of the language model"]
    fix = "or start a new run_dir with model.weights_from"
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = f"{', '.join(changed[:3])}{more}"
        yield f"model.hf={hf}: is not the model that this run began with (other: {what}); give that one again, {fix}"
    starts = (saved.get("weights_from", UNKNOWN), now["weights_from"])
    if UNKNOWN not in starts and starts[0] != starts[1]:
        was = saved["weights_from_folder"] or "none"
        given = now["weights_from_folder"]
        yield f"model.weights_from={given}: this run began with other weights (those of {was}); give them again, {fix}"


def _changed_files(frozen: Path, hf: Path) -> Iterator[str]:
    for path in sorted(frozen.iterdir()):
        if path.name != FROZEN_FILE and not (
            (hf / path.name).is_file() and (hf / path.name).read_bytes() == path.read_bytes()
        ):
            yield path.name


def _changed_tensors(frozen: Path, checkpoint: HfCheckpoint) -> Iterator[str]:
    names = set(checkpoint.names())
    with safe_open(frozen / FROZEN_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            ours = file.get_tensor(name)
            theirs = checkpoint.tensor(name) if name in names else None
            if theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                yield name
            elif different_bits(ours, theirs).any():
                yield name
