# SPDX-License-Identifier: Apache-2.0
"""Whether a Megatron checkpoint is what was written, and whether reading it would run foreign code.

torch reads `.metadata` and the extra states of modules with pickle, which runs what it finds. Both are read here first,
by readers that know nothing but the few classes that belong there; what passes is safe to give to the libraries.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from checkpoint_tools.digests import differences, read_digests

_CLASSES = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
_UNREADABLE = (  # what reading a damaged pickle can end in
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    MemoryError,
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs: foreign code")


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a checkpoint, without running anything that stands in it. Raises ValueError."""
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except _UNREADABLE as error:
        raise ValueError(f".metadata: cannot be read ({_reason(error)})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f".metadata: holds a {type(metadata).__name__}, no metadata")
    return metadata


def problems_of_files(folder: Path, part: int = 0, of: int = 1) -> list[str]:
    """ "FILE: reason" for all that is wrong with a checkpoint; empty where it can be read. Files are compared with
    their digests, of which the caller reads share `part` of `of`. A checkpoint without digests is only looked over."""
    try:
        digests = read_digests(folder)
        found = [] if digests is None else list(differences(folder, digests, part, of))
        return found or list(_problems_of_content(folder, read_metadata(folder), is_old=digests is None))
    except ValueError as error:
        return [str(error)]


def check_files(folder: Path) -> None:
    """Raise one ValueError with all that `problems_of_files` finds."""
    problems = problems_of_files(folder)
    if problems:
        raise ValueError(f"{folder}: cannot be read ({'; '.join(problems)}); copy the checkpoint again")


def _problems_of_content(folder: Path, metadata: Metadata, is_old: bool) -> Iterator[str]:
    ends: dict[str, int] = {}
    for entry in (metadata.storage_data or {}).values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    sizes = {name: (folder / name).stat().st_size for name in ends if (folder / name).is_file()}
    for name, end in sorted(ends.items()):
        if name not in sizes:
            yield f"{name}: missing"
        elif sizes[name] < end:
            yield f"{name}: {sizes[name]} bytes, at least {end} were written"
    yield from _problems_of_states(folder, metadata, {name for name, size in sizes.items() if size >= ends[name]})
    if is_old:
        yield from _problems_of_small_files(folder)


def _problems_of_states(folder: Path, metadata: Metadata, whole: set[str]) -> Iterator[str]:
    """The extra states of modules, which torch would read with pickle, in the files that are whole."""
    for index, entry in (metadata.storage_data or {}).items():
        is_state = isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
        if is_state and entry.relative_path in whole:
            try:
                with (folder / entry.relative_path).open("rb") as file:
                    file.seek(entry.offset)
                    torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
            except _UNREADABLE as error:
                yield f"{entry.relative_path}: {index.fqn} cannot be read ({_reason(error)})"


def _problems_of_small_files(folder: Path) -> Iterator[str]:
    try:
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        yield f"common.pt: cannot be read ({_reason(error)})"
    for path in (folder / "metadata.json", folder / "state.json"):
        if path.is_file():  # a checkpoint of weights alone has no state
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{path.name}: cannot be read ({_reason(error)})"


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
