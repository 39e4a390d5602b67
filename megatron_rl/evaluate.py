# SPDX-License-Identifier: Apache-2.0
"""Greedy answers on a held-out file, optionally with every frame blanked: what can be guessed without looking."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.loop import Rollout, rollout_phase, usable_prompts
from megatron_rl.observe.report import SampleRollout
from megatron_rl.observe.step_metrics import sync_metrics, vision_metrics
from megatron_rl.rollout.generate import generate
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.session import Session
from megatron_rl.types import Group, Row, Sampling


def evaluate(
    session: Session, rollout: Rollout, rows: Sequence[Row], step: int, blind: bool = False
) -> tuple[list[Group], dict[str, float]]:
    """One greedy response per row, scored, and the metrics of the sync that it took. Collective; all ranks get all."""
    cfg = session.cfg
    sampling = Sampling(
        num_samples=1,
        temperature=1.0,
        max_response_tokens=cfg.rollout.max_response_tokens,
        seed=cfg.seed,
        step=step,
        greedy=True,
        weights_version=session.policy.version,
    )
    seeing = replace(session, vision=session.vision.blanked()) if blind else session
    name = "eval_blind" if blind else "eval"
    groups: list[Group] = []
    with rollout_phase(session, rollout, step) as report, session.progress.phase(step, name):
        for start in range(0, len(rows), cfg.eval.batch_size):
            seeing.vision.forget()
            pairs = list(enumerate(rows))[start : start + cfg.eval.batch_size]
            prompts = usable_prompts(seeing, pairs, cfg.data.eval)
            groups += generate(prompts, seeing.vision, rollout.engine, rollout.reward, sampling, session.mesh)
        seeing.vision.forget()
    return groups, sync_metrics(report) | vision_metrics(seeing.vision.take_counts(), "eval_vision")


def accuracy(groups: Sequence[Group]) -> float:
    """Mean of the reward's "accuracy" part, or of the reward where it has none."""
    parts = [group.scored[0].parts for group in groups]
    return statistics.fmean(part.get("accuracy", part["overall"]) for part in parts) if parts else float("nan")


def sample_rollouts(groups: Sequence[Group], count: int) -> list[SampleRollout]:
    """The first response of the first groups, for people to read."""
    shown = []
    for group in groups[:count]:
        row, best = group.prompt.row, group.scored[0]
        shown.append(SampleRollout(row.problem, best.completion.text, row.answer, best.reward))
    return shown


class Evaluation:
    """Runs the held-out set when it is due, writes the answers to `<run_dir>/eval/`, keeps the last ones."""

    def __init__(self, session: Session, rollout: Rollout | None, rows: Sequence[Row]):
        self._session, self._rollout, self._rows = session, rollout, rows
        self._answers = RolloutStore(Path(session.cfg.run_dir) / "eval", writes=session.mesh.rank == 0)
        self.groups: list[Group] = []

    def at_start(self) -> dict[str, float]:
        """Accuracy before the first step."""
        if not self._session.cfg.eval.at_start or not self._possible:
            return {}
        groups, synced = self._run(0, blind=False)
        return {"eval/start_accuracy": accuracy(groups), **synced}

    def after_step(self, step: int) -> dict[str, float]:
        """Accuracy after step `step`, if the recipe wants it then; {} otherwise."""
        cfg, done = self._session.cfg, step + 1
        last = done == cfg.train.num_steps
        due = (cfg.eval.every and done % cfg.eval.every == 0) or (last and cfg.eval.at_end)
        if not due or not self._possible:
            return {}
        self.groups, synced = self._run(step, blind=False)
        self._answers.save(done, self.groups)
        results = {"eval/accuracy": accuracy(self.groups), "eval/num_prompts": float(len(self.groups))}
        if cfg.eval.blind and last:
            results["eval/blind_accuracy"] = accuracy(self._run(step, blind=True)[0])
        return results | synced

    @property
    def _possible(self) -> bool:
        return self._rollout is not None and bool(self._rows)

    def _run(self, step: int, blind: bool) -> tuple[list[Group], dict[str, float]]:
        assert self._rollout is not None
        return evaluate(self._session, self._rollout, self._rows, step, blind)
