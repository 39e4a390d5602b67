# SPDX-License-Identifier: Apache-2.0
"""Which data files a setting such as `data.train` names.

A file (records.py), a folder of them, or a data set on the Hugging Face hub ("owner/name"); `@split` after a folder or
a hub name picks a split; several of them stand with commas between. Nothing is executed and no script is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data.rows.records import FORMS, SUFFIXES, form_of

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"[-_]\d+(-of-\d+)?$")


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one data set, in order, and the folder against which its relative media paths are resolved."""

    name: str
    root: Path
    files: tuple[Path, ...]


def source_names(setting: str) -> list[str]:
    """The data sets that a setting lists."""
    if setting and Path(setting).expanduser().exists():  # a comma in the path
        return [setting]
    return [name.strip() for name in setting.split(",") if name.strip()]


def source_problems(setting: str, field: str) -> list[str]:
    """What is wrong with it, as far as the disk can tell; hub names are looked up when they are opened."""
    problems = []
    for name in source_names(setting):
        if not _is_hub(name):
            try:
                open_source(name, field)
            except ValueError as error:
                problems.append(str(error))
    return problems


def open_source(name: str, field: str) -> Source:
    """Find the files of one data set. Raises ValueError that names `field`."""
    path, split = _parts(name)
    if _is_hub(name):
        path = _download(path, field)
    if not path.exists():
        raise ValueError(
            f"{field}={name}: no such file; give a JSONL, JSON or Parquet file, a folder of them, or owner/name of a "
            "data set on the Hugging Face hub"
        )
    if path.is_file():
        if split:
            raise ValueError(f"{field}={name}: a single file has no splits; leave out @{split}")
        if not form_of(path.name):
            raise ValueError(f"{field}={name}: not one of {', '.join(SUFFIXES)}; convert it")
        return Source(name, path.parent.absolute(), (path,))
    return Source(name, path.absolute(), _files_of_split(path, split, f"{field}={name}"))


def _parts(name: str) -> tuple[Path, str]:
    if Path(name).expanduser().exists() or "@" not in name:
        return Path(name).expanduser(), ""
    path, _, split = name.rpartition("@")
    return Path(path).expanduser(), split


def _is_hub(name: str) -> bool:
    path, _ = _parts(name)
    return not path.exists() and not form_of(path.name) and _HUB_NAME.fullmatch(str(path)) is not None


def _download(path: Path, field: str) -> Path:
    """Data files of a hub data set, in the hub's cache; nothing is loaded that is not there already when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(snapshot_download(str(path), repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{field}={path}: neither a file here nor a data set that can be had from the hub ({reason}); check the "
            "name and the network"
        ) from error


def _files_of_split(folder: Path, split: str, setting: str) -> tuple[Path, ...]:
    """All files whose own name or folder is that of the split; without one, the only split there is, or "train"."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if form_of(path.name) and path.is_file()):
        for name in {_SHARD.sub("", path.name.removesuffix(form_of(path.name))), *path.relative_to(folder).parts[:-1]}:
            splits.setdefault(name, []).append(path)
    if not splits:
        raise ValueError(f"{setting}: the folder holds no {', '.join(FORMS)} file; check the path")
    if not split:
        only = next(iter(splits)) if len({tuple(files) for files in splits.values()}) == 1 else "train"
        split = "train" if "train" in splits else only
    if split not in splits:
        raise ValueError(f"{setting}: has the splits {', '.join(sorted(splits))}; choose one with @{sorted(splits)[0]}")
    return tuple(splits[split])
