# SPDX-License-Identifier: Apache-2.0
"""Greedy answers on a held-out file, optionally with every frame blanked: what can be guessed without looking."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.report import SampleRollout
from megatron_rl.observe.step_metrics import media_metrics, sync_metrics
from megatron_rl.protocols import StepEncoder
from megatron_rl.rollout.colocated import ColocatedEngine
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.types import Group, Row, Sampling


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """When the held-out rows are answered, and how many at a time. `every` 0: only at the start and the end. `blind`:
    at the end also with blanked media."""

    every: int
    at_start: bool
    at_end: bool
    blind: bool
    batch_size: int
    num_steps: int

    def is_due(self, step: int) -> bool:
        """After step `step` (from 0)."""
        done = step + 1
        return bool(self.every and done % self.every == 0) or (self.is_last(step) and self.at_end)

    def is_last(self, step: int) -> bool:
        return step + 1 == self.num_steps


class Evaluation:
    """Runs the held-out set when it is due, says the accuracy, writes the answers to `answers`, keeps the last ones.

    Without an engine or rows nothing is ever due. `name` is that of the data set, for messages. Every method is
    collective.
    """

    def __init__(
        self,
        colocated: ColocatedEngine | None,
        prompts: PromptPrefetcher,
        encoder: StepEncoder,
        rows: Sequence[Row],
        name: str,
        sampling: Sampling,
        plan: EvaluationPlan,
        answers: RolloutStore,
        progress: Progress,
    ):
        self._colocated, self._prompts, self._encoder = colocated, prompts, encoder
        self._rows, self._name, self._sampling, self._plan = rows, name, sampling, plan
        self._answers, self._progress = answers, progress
        self.groups: list[Group] = []

    def at_start(self) -> dict[str, float]:
        """Accuracy before the first step, if it is due; the answers are kept as those of step 0."""
        if not self._plan.at_start or self._colocated is None or not self._rows:
            return {}
        groups, metrics = self._run(self._colocated, 0, blind=False)
        self._answers.save(0, groups)
        self._say("before the first step", groups)
        return {"eval/start_accuracy": accuracy(groups), **metrics}

    def is_due(self, step: int) -> bool:
        """After step `step`."""
        return self._plan.is_due(step) and self._colocated is not None and bool(self._rows)

    def after_step(self, step: int) -> dict[str, float]:
        """Accuracy after step `step`, if it is due; {} otherwise."""
        if self._colocated is None or not self.is_due(step):
            return {}
        self.groups, metrics = self._run(self._colocated, step, blind=False)
        self._answers.save(step + 1, self.groups)
        self._say(f"after step {step + 1}", self.groups)
        results = {"eval/accuracy": accuracy(self.groups), "eval/num_prompts": float(len(self.groups))}
        if self._plan.blind and self._plan.is_last(step):
            blind = self._run(self._colocated, step, blind=True)[0]
            self._say(f"after step {step + 1}, with the media blanked", blind)
            results["eval/blind_accuracy"] = accuracy(blind)
        return results | metrics

    def _say(self, when: str, groups: Sequence[Group]) -> None:
        self._progress.say(f"held-out accuracy {when}: {accuracy(groups):.1%} of {len(groups)} rows of {self._name}")

    def _run(self, colocated: ColocatedEngine, step: int, blind: bool) -> tuple[list[Group], dict[str, float]]:
        """One greedy response per row, scored, and the metrics of the weight sync that it took."""
        encoder = self._encoder.blanked() if blind else self._encoder
        sampling, size = replace(self._sampling, step=step), self._plan.batch_size
        groups: list[Group] = []
        name = "eval_blind" if blind else "eval"
        with colocated.awake(step) as report, self._progress.phase(step, name):
            for start in range(0, len(self._rows), size):
                encoder.forget()
                pairs = list(enumerate(self._rows))[start : start + size]
                prompts = self._prompts.encoded(pairs, self._name, encoder)
                groups += colocated.sample(prompts, encoder, sampling)
            encoder.forget()
        return groups, sync_metrics(report) | media_metrics(encoder.take_counts(), "eval_vision")


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
