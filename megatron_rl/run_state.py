# SPDX-License-Identifier: Apache-2.0
"""What the jobs share around their steps: resume, log, save, and the summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from data.rows.loader import RowLoader
from megatron_rl.observe.advice import StepAdvice
from megatron_rl.observe.metric_log import METRICS_FILE, MetricLog, read_metrics
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.report import SampleRollout, plot_curves, rollout_table, write_summary
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.runtime.signals import StopFlag
from megatron_rl.training import checkpoint
from megatron_rl.training.policy import Policy

STOP_ADVICE = "run the same command again to resume"


@dataclass(frozen=True, slots=True)
class SavePlan:
    """When a run saves: every so many steps (0: not between), at the end, and where a metric reaches a new height; how
    many checkpoints it keeps besides the best; whether it goes on from the newest one."""

    every: int
    at_end: bool
    best_metric: str
    keep: int
    resume: bool


class RunState:
    """Logging and checkpoints of one run. `hf_source` is the folder whose configuration and tokenizer go with them,
    `origin` what the run began with (checkpoint_tools.origin; only that of rank 0 counts).

    `best` is (value, step) of the metric that marks the best checkpoint; `pending` holds metrics measured between
    steps, logged with the next one; `stopped`: someone asked the job to stop (SIGTERM, SIGUSR1), and it leaves as soon
    as it has saved. `owes_evaluation`: that of the newest checkpoint was left out, to leave sooner. Every method but
    `close` is collective.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        hf_source: str,
        origin: Mapping[str, str],
        policy: Policy,
        mesh: ParallelMesh,
        plan: SavePlan,
        log: MetricLog,
        progress: Progress,
        stop: StopFlag,
    ):
        self.run_dir, self.progress = run_dir, progress
        self._num_steps, self._hf_source, self._origin = num_steps, hf_source, origin
        self._policy, self._mesh = policy, mesh
        self._plan, self._log, self._stop = plan, log, stop
        self._loader: RowLoader | None = None
        self._place_in_rows: dict[str, Any] | None = None  # of a run that takes no rows: that of the checkpoint
        self._advice = StepAdvice()
        self.best: tuple[float, int] | None = None
        self.pending: dict[str, float] = {}
        self.stopped = self.owes_evaluation = False
        self._resumed = 0

    def asked_to_stop(self, step: int) -> bool:
        """Whether to leave after step `step` (from 0; -1 before the first): not after the last one, which ends well."""
        self.stopped = self.stopped or (self._stop.agreed() and step + 1 < self._num_steps)
        return self.stopped

    def leaves_before(self, step: int) -> bool:
        """Whether to leave before step `step`, with nothing to save."""
        if self.asked_to_stop(step - 1):
            self.progress.say(f"asked to stop before step {step + 1}: {STOP_ADVICE}")
        return self.stopped

    def make_up(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what an evaluation tells that was left out: it belongs to `step`, which was logged last."""
        self.owes_evaluation = False
        self._is_best(metrics.get(self._plan.best_metric), step + 1)
        self._log.extend(metrics)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def resume(self, loader: RowLoader | None) -> int:
        """The step to go on from: that of the newest checkpoint of this run, or 0. The place of `loader` in its rows is
        restored now and saved later."""
        self._loader, steps = loader, checkpoint.list_steps(self.checkpoints)
        if self._mesh.rank == 0:
            checkpoint.remove_leftovers(self.checkpoints)
        if not (self._plan.resume and steps):
            self._log.resume_from(0)
            return 0
        folder = checkpoint.step_folder(self.checkpoints, steps[-1])
        with self.progress.starting("load_checkpoint"):
            state = checkpoint.load(folder, self._policy, self._mesh)
            checkpoint.check_origin(folder, Path(self._hf_source), self._origin)
        self._tell_if_finished(state["step"])
        self._place_in_rows = state["loader"]
        if loader is not None and self._place_in_rows is None:
            raise ValueError(
                f"rollout.replay_from=: the checkpoints in {self.checkpoints} were made from saved rollouts and know "
                "no place in data.train; go on with rollout.replay_from, or start a new run_dir with model.weights_from"
            )
        if loader is not None and self._place_in_rows is not None:
            loader.load_state_dict(self._place_in_rows)
        self.best = tuple(state["best"]) if state["best"] else None
        self.owes_evaluation = state.get("owes_evaluation", False)
        self._log.resume_from(state["step"])
        return int(state["step"])

    def _tell_if_finished(self, step: int) -> None:
        """A run that has all its steps does nothing, and says so."""
        self._resumed = step
        if self._mesh.rank == 0 and step >= self._num_steps:
            text = f"run_dir={self.run_dir}: has {step} steps, train.num_steps={self._num_steps} asks for no more"
            console = Console(highlight=False, markup=False, soft_wrap=True)
            console.print(f"{text}; raise it to go on, or use a new run_dir")

    def end_step(self, step: int, metrics: Mapping[str, float], note: str) -> None:
        """Log step `step` (from 0) and save if it is time, or if the job was asked to stop."""
        values = {**self.pending, **metrics}
        self.pending = {}
        done = step + 1
        is_best, is_last = self._is_best(values.get(self._plan.best_metric), done), done == self._num_steps
        self.asked_to_stop(step)
        due = (self._plan.every and done % self._plan.every == 0) or (is_last and self._plan.at_end)
        learned = self._policy.version > 0  # rollouts alone change nothing that could be saved
        note += f"; asked to stop: {STOP_ADVICE}" if self.stopped else ""
        values |= self.progress.end_step(step, note)
        for advice in self._advice.look(values):
            self.progress.say(f"step {done}: {advice}")
        # Before the save: a resume forgets rows of steps that will be made again, but cannot invent one.
        self._log.log(step, values)
        if learned and (due or (is_best and self._plan.every) or self.stopped):
            with self.progress.phase(step, "save_checkpoint"):
                self.save(done)
            self._log.extend(self.progress.extend_step("save_checkpoint"))
            if not self.stopped and self.asked_to_stop(step):
                self.progress.say(f"asked to stop; step {done} is saved: {STOP_ADVICE}")

    def _is_best(self, metric: float | None, done: int) -> bool:
        if metric is not None and not math.isnan(metric) and (self.best is None or metric > self.best[0]):
            self.best = (metric, done)
        return self.best is not None and self.best[1] == done

    def save(self, done: int) -> Path:
        """Write the checkpoint of `done` steps, then remove those that are no longer kept."""
        place = self._loader.state_dict() if self._loader is not None else self._place_in_rows
        state: dict[str, Any] = {
            "best": self.best,
            "loader": place,
            "origin": self._origin,
            "owes_evaluation": self.owes_evaluation,
        }
        folder = checkpoint.save(self.checkpoints, done, self._policy, self._mesh, state, self._hf_source)
        if self._mesh.rank == 0:
            checkpoint.prune(self.checkpoints, self._plan.keep, self.best[1] if self.best else None)
        return folder

    def export_hf(self) -> str:
        """The newest checkpoint as a Hugging Face folder in the run's; returns its path."""
        from checkpoint_tools.mcore_to_hf import mcore_to_hf

        target = self.run_dir / "hf"
        with self.progress.phase(self._num_steps - 1, "export_hf"):
            if self._mesh.rank == 0:
                steps = checkpoint.list_steps(self.checkpoints)
                if not steps:
                    raise ValueError(
                        "checkpoint.export_hf=true: no update was made, so there is nothing to export; set it to false"
                    )
                mcore_to_hf(checkpoint.step_folder(self.checkpoints, steps[-1]), target, force=True)
            dist.barrier()
        return str(target)

    def close(self, summary: Mapping[str, Any], rollouts: list[SampleRollout]) -> None:
        """Write summary.json and the curves, show sample rollouts, close the logs. Only rank 0 does anything."""
        self._log.close()
        if self._mesh.rank != 0:
            return
        with self.progress.phase(self._num_steps - 1, "summary"):
            rows = read_metrics(self.run_dir / METRICS_FILE)
            num_steps = max(self._num_steps, self._resumed)
            write_summary(self.run_dir, {"num_steps": num_steps, **summary, "seconds": _seconds(rows)})
            plot_curves(self.run_dir)
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
