# SPDX-License-Identifier: Apache-2.0
"""What the files of a Hugging Face folder hold and what is wrong with them, from their headers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"  # some checkpoints with tied embeddings hold the embedding a second time under this name

# transformers 5 names the same tensors differently in memory and, in some releases, on disk.
_ALIASES = (("model.language_model.", "model."), ("model.visual.", "visual."))
_LFS_MARK = b"version https://git-lfs"
_MOST_LISTED = 20
_BLOCK = 1 << 24
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",))


def canonical_hf_name(key: str) -> str:
    for prefix, replacement in _ALIASES:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `key` is its name in `file`, whose bytes from `start` to `stop` it fills."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensor_files(folder: Path) -> dict[str, StoredTensor]:
    """{canonical name: tensor} of a checkpoint in one file or many. Raises one ValueError with every damaged,
    missing or misnamed file."""
    index = _read_index(folder)
    files = sorted(set(index.values())) if index else [SINGLE_FILE]
    if index is None and not (folder / SINGLE_FILE).is_file():
        raise ValueError(
            f"{folder}: holds neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors checkpoints are read"
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: {INDEX_FILE} names files that are not there: {missing}; download them again")
    stored: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for file in files:
        try:
            stored[file] = _read_header(folder, file)
        except ValueError as error:
            problems.append(f"{file} {error}")
    if not problems and index is not None:
        problems = list(_misnamed(index, stored))
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    return {
        canonical_hf_name(key): tensor
        for file, tensors in stored.items()
        for key, tensor in tensors.items()
        if index is None or index.get(key) == file
    }


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {INDEX_FILE} {_why_unreadable(path, error)}; download it again") from error


def _read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Raises ValueError: what is wrong with the file, to be put behind its name."""
    path = folder / name
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size - 8 else b""
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {
            key: StoredTensor(
                name,
                key,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for key, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{_why_unreadable(path, error)}; download it again") from error
    wanted = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size < wanted:
        raise ValueError(f"is cut: {size:,} of {wanted:,} bytes are there; download it again")
    if size > wanted:
        raise ValueError(f"has {size:,} bytes, its header describes {wanted:,}; download it again")
    return tensors


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_LFS_MARK))
    if start == _LFS_MARK:
        return "is a pointer of Git LFS and not the file (run `git lfs pull`)"
    return "is empty" if not start else f"is cut or damaged ({type(error).__name__})"


def _misnamed(index: Mapping[str, str], stored: Mapping[str, Mapping[str, StoredTensor]]) -> Iterator[str]:
    wrong = [key for key, file in index.items() if key not in stored[file]]
    for key in wrong[:_MOST_LISTED]:
        holders = [file for file in stored if key in stored[file]]
        where = f"it is in {holders[0]}" if holders else "no file holds it"
        yield f"{INDEX_FILE} says that {key} is in {index[key]}, but {where}; download the index again"
    if len(wrong) > _MOST_LISTED:
        yield f"and so for {len(wrong) - _MOST_LISTED} more tensors"


def misfits(stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every missing and every misshapen tensor of {name: shape}; one line where all stand behind a prefix."""
    missing = [name for name in wanted if name not in stored]
    if missing and (prefix := _common_prefix(stored, missing)):
        names = ", ".join([key for key in stored if key.startswith(prefix)][:2])
        how = (
            "merge the adapter into the model and save that" if prefix.startswith("base_model.") else "save it without"
        )
        return [f"the names in its files begin with {prefix!r} ({names} ...), which no model has; {how}"]
    problems = [f"{name}: missing, expected shape {list(wanted[name])}" for name in missing]
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            problems.append(f"{name}: shape {list(stored[name].shape)}, expected {list(shape)}")
    if len(problems) > _MOST_LISTED:
        held = f"its files hold {', '.join(sorted(stored)[:3])} ..." if stored else "its files hold nothing"
        return [*problems[:_MOST_LISTED], f"and {len(problems) - _MOST_LISTED} more; {held}"]
    return problems


def _common_prefix(stored: Mapping[str, StoredTensor], missing: list[str]) -> str:
    """What stands before the names of most of the missing tensors; "" if nothing does."""
    prefixes = {key.removesuffix(missing[0]) for key in stored if key.endswith(f".{missing[0]}")}
    counts = {prefix: sum(prefix + name in stored for name in missing) for prefix in prefixes}
    best = max(counts, key=lambda prefix: counts[prefix], default="")
    return best if best and 2 * counts[best] > len(missing) else ""


def tied_copy_problem(folder: Path, stored: Mapping[str, StoredTensor], embedding: str) -> str:
    """What is wrong with the second copy of a tied embedding, "" if it is none or equal to the last bit."""
    head, table = stored.get(HEAD), stored.get(embedding)
    if head is None or table is None:
        return ""
    if head.shape == table.shape and head.dtype == table.dtype and _same_bytes(folder, head, table):
        return ""
    return (
        f"{folder}: config.json ties the embeddings, but {HEAD} ({head.file}) differs from {embedding}; "
        f"set tie_word_embeddings to false, or delete {HEAD}"
    )


def _same_bytes(folder: Path, a: StoredTensor, b: StoredTensor) -> bool:
    with (folder / a.file).open("rb") as first, (folder / b.file).open("rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        for start in range(a.start, a.stop, _BLOCK):
            length = min(_BLOCK, a.stop - start)
            if first.read(length) != second.read(length):
                return False
    return True


def tokenizer_problems(folder: Path, vocab_size: int) -> Iterator[str]:
    """Why the tokenizer of a folder cannot be used with a table of `vocab_size` rows."""
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        yield f"{folder}: no tokenizer.json; copy the tokenizer's files of the model into it"
        return
    try:
        ids = _token_ids(folder)
    except ValueError as error:
        yield f"{folder}: {error}; download it again"
        return
    beyond = sorted((number, token) for token, number in ids.items() if number >= vocab_size)
    if beyond:
        examples = ", ".join(f"{token!r} is {number}" for number, token in beyond[:3])
        yield (
            f"{folder}: the tokenizer has ids up to {beyond[-1][0]} ({examples}), config.json a vocabulary of "
            f"{vocab_size}; resize the embeddings of the model, or remove the added tokens"
        )


def _token_ids(folder: Path) -> dict[str, int]:
    """{token: id}, as far as JSON files tell. Raises ValueError."""
    ids: dict[str, int] = {}
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        path = folder / name
        if not path.is_file() or (name == "vocab.json" and ids):
            continue
        try:
            content = json.loads(path.read_bytes())
            if name != "tokenizer.json":
                ids |= content
                continue
            ids |= _vocabulary(content["model"].get("vocab", {}))
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} {_why_unreadable(path, error)}") from error
    return ids


def _vocabulary(vocab: Any) -> dict[str, int]:
    """Byte-pair and word vocabularies are {token: id}, unigram ones lists of [token, score]."""
    return dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
