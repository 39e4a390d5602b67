# SPDX-License-Identifier: Apache-2.0
"""A file is there complete or as it was: whatever fails while it is written, and whoever writes it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from checkpoint_tools.console import write_json
from megatron_rl.observe.metric_log import MetricLog
from megatron_rl.observe.report import plot_curves, write_summary
from megatron_rl.runtime.files import write_atomically, written_atomically

FULL = OSError(errno.ENOSPC, "no space left on device")


def half_written(path: Path, content: bytes) -> int:
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise FULL


def test_a_file_and_its_folder_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [b"old", None])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "state.json"
    if before is not None:
        path.write_bytes(before)
    with mock.patch.object(Path, "write_bytes", half_written), pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new content")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"state.json": before} if before else {})


@pytest.mark.parametrize("error", [FULL, ValueError("not a tensor"), KeyboardInterrupt()])
def test_a_library_that_fails_half_way_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), written_atomically(path) as scratch:
        scratch.write_bytes(b"ne")
        raise error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"curves.png": b"old"}


def test_a_rename_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()  # a folder is in the way
    with pytest.raises(OSError):
        write_atomically(tmp_path / "state", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_readers_of_the_name_see_no_half_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with written_atomically(path) as scratch:
        scratch.write_bytes(b"ne")
        assert path.read_bytes() == b"old" and scratch.parent == tmp_path
        scratch.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def _log(folder: Path) -> MetricLog:
    return MetricLog(folder, rank0=True, wandb="off", project="", tensorboard=False, config={})


def _forget_steps(folder: Path) -> None:
    _log(folder).resume_from(1)


def _draw(folder: Path) -> None:
    plot_curves(folder)


def _summary(folder: Path) -> None:
    write_summary(folder, {"num_steps": 3})


def _report(folder: Path) -> None:
    write_json(folder / "report.json", {"num_tensors": 3})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", _forget_steps),
        ("curves.png", _draw),
        ("summary.json", _summary),
        ("report.json", _report),
    ],
)
def test_every_writer_keeps_the_old_file_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    rows = "".join(json.dumps({"step": step, "sft/nll": 1.0}) + "\n" for step in range(3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / name).touch()
    before = (tmp_path / name).read_bytes()
    with mock.patch.object(Path, "replace", side_effect=FULL), pytest.raises(OSError, match="no space left"):
        write(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", name}
    write(tmp_path)
    assert (tmp_path / name).read_bytes() != before
