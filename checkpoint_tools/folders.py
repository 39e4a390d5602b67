# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie: the newest step of a run, and folders that appear complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MCORE_MARKS = (".metadata", "metadata.json")  # both are written last, by torch and by Megatron-core
HF_MARK = "config.json"


def is_mcore(folder: Path) -> bool:
    return all((folder / mark).is_file() for mark in MCORE_MARKS)


def find_mcore(folder: Path, option: str) -> Path:
    """`folder` itself, or the newest complete `step_N` in it."""
    if is_mcore(folder):
        return folder
    steps = {int(match[1]): p for p in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", p.name))}
    complete = [step for step, path in steps.items() if is_mcore(path)]
    if not complete:
        raise ValueError(f"{option}={folder}: holds no Megatron checkpoint; give a step_N folder or a folder of them")
    return steps[max(complete)]


@contextmanager
def new_folder(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its name when the block ends well and vanishes when it does not."""
    _check_free(out, source, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    scratch.mkdir()
    try:
        yield scratch
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_free(out: Path, source: Path, force: bool) -> None:
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise ValueError(f"--out={out}: would replace what is being read ({source}); give another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out}: is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(f"--out={out}: is not empty; give another folder, or --force to replace a checkpoint")
    if not is_mcore(out) and not (out / HF_MARK).is_file():
        raise ValueError(f"--out={out}: --force replaces checkpoints only, and this is none; give another folder")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
