# SPDX-License-Identifier: Apache-2.0
"""Data files -> records: JSONL, JSON (a list, or lines), both also packed (.gz, .zst), and Parquet."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

FORMS = (".jsonl", ".json", ".parquet")
SUFFIXES = (*FORMS, ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


def form_of(name: str) -> str:
    """The suffix in SUFFIXES that a file name ends in, the longest; empty where it is no data file."""
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def read_records(file: Path, setting: str) -> Iterator[tuple[int, object]]:
    """(number from 1, record) of a file; a line of JSONL comes undecoded, see `decoded`. `setting` names the data set
    in errors. Raises ValueError for a file that is not of its form."""
    form = form_of(file.name)
    if form == ".parquet":
        yield from enumerate(_parquet(file, setting), start=1)
        return
    content = _unpacked(file, setting).removeprefix(codecs.BOM_UTF8)
    if form.startswith(".jsonl"):
        yield from _lines(content)
    else:
        yield from _json(content, file, setting)


def decoded(line: bytes) -> object:
    """The record of one line. Raises ValueError that says what is wrong with it."""
    try:
        record: object = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of the line") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deeply") from error
    return record


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())


def _json(content: bytes, file: Path, setting: str) -> Iterator[tuple[int, object]]:
    """A list of records, or a record a line under the name of JSON, as `datasets.Dataset.to_json` writes them."""
    first, _, rest = content.lstrip().partition(b"\n")
    if _is_object(first) and (not rest.strip() or rest.lstrip().startswith(b"{")):
        yield from _lines(content)
        return
    try:
        records = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{setting}: {file.name} is not JSON ({error}); is it JSONL?") from error
    if not isinstance(records, list):
        raise ValueError(f"{setting}: {file.name} holds no list of records; use JSONL or a JSON list")
    yield from enumerate(records, start=1)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unpacked(file: Path, setting: str) -> bytes:
    """Raises ValueError for a packed file that is cut or damaged."""
    content = file.read_bytes()
    try:
        if file.suffix == ".gz":
            return gzip.decompress(content)
        return _from_zstandard(content) if file.suffix == ".zst" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{setting}: {file.name} cannot be unpacked ({error}); copy it again") from error


def _from_zstandard(content: bytes) -> bytes:
    """Every frame of the file, with the codec of pyarrow."""
    import pyarrow

    if not content:
        return b""
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        unpacked: bytes = stream.read()
    return unpacked


def _parquet(file: Path, setting: str) -> Iterator[object]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{setting}: {file.name} is no readable Parquet file ({error}); copy it again") from error
