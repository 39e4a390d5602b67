# SPDX-License-Identifier: Apache-2.0
"""What the jobs share around their steps: resume, log, evaluate, save, and the summary at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from data.rows.loader import RowLoader
from megatron_rl.observe.metric_log import METRICS_FILE, read_metrics
from megatron_rl.observe.report import SampleRollout, plot_curves, rollout_table, write_summary
from megatron_rl.session import Session
from megatron_rl.training import checkpoint


@dataclass(slots=True)
class RunState:
    """Logging and checkpoints of one job. `best` is (value, step) of `checkpoint.best_metric`."""

    session: Session
    loader: RowLoader | None
    best: tuple[float, int] | None = None
    pending: dict[str, float] = field(default_factory=dict)
    """Metrics measured between steps; logged with the next one."""
    stopped: bool = False
    """Someone asked the job to stop (SIGTERM, SIGUSR1): it has saved and is about to leave."""

    def resume(self) -> int:
        """The step to go on from: that of the newest checkpoint of this run, or 0. Collective."""
        cfg, steps = self.session.cfg, checkpoint.list_steps(self.session.checkpoints)
        if not (cfg.checkpoint.resume and steps):
            self.session.log.resume_from(0)
            return 0
        folder = checkpoint.step_folder(self.session.checkpoints, steps[-1])
        state = checkpoint.load(folder, self.session.policy, self.session.mesh)
        if self.loader is not None:
            self.loader.load_state_dict(state["loader"])
        self.best = tuple(state["best"]) if state["best"] else None
        self.session.log.resume_from(state["step"])
        return state["step"]

    def end_step(self, step: int, metrics: Mapping[str, float], note: str) -> None:
        """Log step `step` (from 0) and save if it is time, or if the job was asked to stop. Collective."""
        cfg = self.session.cfg.checkpoint
        values = {**self.pending, **metrics}
        self.pending = {}
        done = step + 1
        metric = values.get(cfg.best_metric)
        if metric is not None and (self.best is None or metric > self.best[0]):
            self.best = (metric, done)
        is_best = self.best is not None and self.best[1] == done
        last = done == self.session.cfg.train.num_steps
        self.stopped = self.session.stop.agreed() and not last
        due = (cfg.every and done % cfg.every == 0) or (last and cfg.save_at_end)
        learned = self.session.policy.version > 0  # rollouts alone change nothing that could be saved
        note += "; asked to stop: run the same command again to resume" if self.stopped else ""
        values |= self.session.progress.end_step(step, note)
        # Before the save: a resume forgets rows of steps that will be made again, but cannot invent one.
        self.session.log.log(step, values)
        if learned and (due or (is_best and cfg.every) or self.stopped):
            with self.session.progress.phase(step, "save_checkpoint"):
                self.save(done)

    def save(self, done: int) -> Path:
        state: dict[str, Any] = {"best": self.best, "loader": self.loader.state_dict() if self.loader else None}
        session = self.session
        folder = checkpoint.save(
            session.checkpoints, done, session.policy, session.mesh, state, hf_source=session.cfg.model.hf
        )
        if session.mesh.rank == 0:
            checkpoint.prune(session.checkpoints, session.cfg.checkpoint.keep, self.best[1] if self.best else None)
        return folder

    def export_hf(self) -> str:
        """The newest checkpoint as a Hugging Face folder; empty unless `checkpoint.export_hf`. Collective."""
        cfg = self.session.cfg
        if not cfg.checkpoint.export_hf:
            return ""
        from checkpoint_tools.mcore_to_hf import mcore_to_hf

        target = Path(cfg.run_dir) / "hf"
        if self.session.mesh.rank == 0:
            steps = checkpoint.list_steps(self.session.checkpoints)
            mcore_to_hf(checkpoint.step_folder(self.session.checkpoints, steps[-1]), target, force=True)
        dist.barrier()
        return str(target)

    def close(self, summary: Mapping[str, Any], rollouts: list[SampleRollout]) -> None:
        """Write summary.json and the curves, show sample rollouts, close the logs. Only rank 0 does anything."""
        session = self.session
        session.log.close()
        if session.mesh.rank != 0:
            return
        run_dir = Path(session.cfg.run_dir)
        rows = read_metrics(run_dir / METRICS_FILE)
        write_summary(run_dir, {"num_steps": session.cfg.train.num_steps, **summary, "seconds": _seconds(rows)})
        plot_curves(run_dir)
        if rollouts:
            Console().print(rollout_table(rollouts))


def highest(run_dir: str, name: str) -> float | None:
    """The largest value that a metric had in the whole run, resumed parts included."""
    values = [row[name] for row in read_metrics(Path(run_dir) / METRICS_FILE) if name in row]
    return max(values) if values else None


def first(run_dir: str, name: str) -> float | None:
    return next((row[name] for row in read_metrics(Path(run_dir) / METRICS_FILE) if name in row), None)


def last(run_dir: str, name: str) -> float | None:
    return next((row[name] for row in reversed(read_metrics(Path(run_dir) / METRICS_FILE)) if name in row), None)


def _seconds(rows: list[dict[str, float]]) -> dict[str, float]:
    """Wall-clock seconds of each phase over the whole run."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("timing_s/"):
                phase = name.removeprefix("timing_s/")
                totals[phase] = round(totals.get(phase, 0.0) + value, 3)
    return totals
