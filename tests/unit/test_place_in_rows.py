# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of the place in the training rows, when runs with and without rows go on from each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data.rows.loader import RowLoader
from megatron_rl.observe.metric_log import MetricLog
from megatron_rl.observe.progress import Progress
from megatron_rl.run_state import RunState, SavePlan
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.runtime.signals import StopFlag
from megatron_rl.training import checkpoint
from megatron_rl.types import Row

MESH = ParallelMesh(0, Grid(1), Grid(1))
NOT_ASKED: Any = None


class Checkpoints:
    """The state of the newest one, without weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.state: dict[str, Any] = {}
        monkeypatch.setattr(checkpoint, "save", self.save)
        monkeypatch.setattr(checkpoint, "load", lambda *_: self.state)
        monkeypatch.setattr(checkpoint, "check_origin", lambda *_: None)

    def save(
        self, root: Path, step: int, policy: object, mesh: object, state: Mapping[str, Any], hf_source: str
    ) -> Path:
        self.state = {"step": step, **state}
        folder = checkpoint.step_folder(root, step)
        folder.mkdir(parents=True)
        return folder


def loader() -> RowLoader:
    return RowLoader([[Row(f"rows:{i}", f"{i}?", "") for i in range(9)]], batch_size=2, seed=1, shuffle=False)


def run(folder: Path, rows: RowLoader | None, until: int) -> None:
    """Steps from where the newest checkpoint is; one is saved at the end."""
    log = MetricLog(folder, rank0=False, wandb="off", project="", tensorboard=False, config={})
    plan = SavePlan(every=0, at_end=True, best_metric="", keep=9, resume=True)
    progress = Progress(until, enabled=False)
    state = RunState(folder, until, "", {}, NOT_ASKED, MESH, plan, log, progress, StopFlag())
    for _ in range(state.resume(rows), until):
        if rows is not None:
            rows.next_batch()
    state.save(until)


def test_replayed_rollouts_keep_the_place_in_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Checkpoints(monkeypatch)
    run(tmp_path, loader(), until=1)
    before = saved.state["loader"]
    run(tmp_path, None, until=2)
    assert saved.state["step"] == 2 and saved.state["loader"] == before
    rows = loader()
    run(tmp_path, rows, until=3)
    assert [prompt_id for prompt_id, _ in rows.next_batch()] == [4, 5]


def test_rows_do_not_begin_anew_behind_replayed_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoints(monkeypatch)
    run(tmp_path, None, until=1)
    run(tmp_path, None, until=2)
    with pytest.raises(ValueError, match=r"rollout\.replay_from=: .* know no place in data\.train; go on with"):
        run(tmp_path, loader(), until=3)


def test_an_export_without_a_checkpoint_says_why(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, rank0=False, wandb="off", project="", tensorboard=False, config={})
    plan = SavePlan(every=0, at_end=True, best_metric="", keep=1, resume=True)
    state = RunState(tmp_path, 1, "", {}, NOT_ASKED, MESH, plan, log, Progress(1, enabled=False), StopFlag())
    with pytest.raises(ValueError, match=r"checkpoint\.export_hf=true: no update was made"):
        state.export_hf()
