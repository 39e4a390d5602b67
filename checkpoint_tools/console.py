# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr, results on stdout and, if asked for, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from megatron_rl.runtime.files import write_atomically

T = TypeVar("T")


def follow(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a progress bar on stderr while they are used; silent where stderr is no terminal."""
    console = Console(stderr=True)
    yield from track(items, what, total=total, console=console, disable=not sys.stderr.isatty(), transient=True)


def note(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)


def say(text: str) -> None:
    Console(highlight=False, markup=False, soft_wrap=True).print(text)


def write_json(path: Path, report: Mapping[str, object]) -> None:
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def size_text(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
