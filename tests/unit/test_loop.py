# SPDX-License-Identifier: Apache-2.0
"""The step of the algorithm around stand-ins for engine, learner and encoder: what happens, in which order, and what
is left when something fails. A world of one rank, no weights, no files but rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from data.rows.loader import RowLoader
from megatron_rl.evaluate import Evaluation, EvaluationPlan
from megatron_rl.loop import rl_step, sample_step
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.rollout.colocated import ColocatedEngine, ColocatedRollouts, GroupFilter
from megatron_rl.rollout.generate import generate
from megatron_rl.rollout.replayed import ReplayedRollouts
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.types import Completion, Prompt, Row, Sampling
from tests.fakes import FakeEncoder, FakeEngine, FakeLearner, FakeWeightSync
from tests.tiny_policy import video

MESH = ParallelMesh(0, Grid(1), Grid(1))
NUM_STEPS, BATCH = 3, 2
ROWS = [Row(f"rows.jsonl:{i}", f"question {i}", "yes", (f"{i}.mp4",)) for i in range(8)]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Builder:
    """A prompt of three tokens around the one video of a row."""

    def build(self, prompt_id: int, row: Row) -> Prompt:
        [path] = row.videos
        item = replace(video(path, (1, 2, 2)), path=path)
        return Prompt(prompt_id, row, (1, 9, 2), (item,), (((1, 2),),))


def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
    """1 for a right answer; only short answers have a part of their own."""
    parts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        right = float(completion.text == prompt.row.answer)
        parts.append({"overall": right, **({"short": 0.5} if len(completion.text) == 2 else {})})
    return parts


@dataclass
class Step:
    """All parts of a run; `answers` are those of the engine, two to a prompt."""

    folder: Path
    answers: Callable[[Prompt], Sequence[str]] = lambda prompt: ("yes", "no")
    broken: frozenset[str] = frozenset()
    group_filter: GroupFilter | None = None
    store: RolloutStore | None = None
    fails: bool = False
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine, self.learner = FakeEngine(self.events, self.answers), FakeLearner(self.events)
        self.encoder = FakeEncoder(self.events, self.broken)
        self.quarantine = Quarantine(self.folder, writes=True, max_fraction=0.5)
        self.progress = Progress(NUM_STEPS, enabled=False)
        self.prompts = PromptPrefetcher(Builder(), MESH, self.encoder, self.quarantine)
        sync = FakeWeightSync(self.events, self.fails)
        self.colocated = ColocatedEngine(self.engine, sync, reward, self.learner, MESH, self.progress)
        self.source = ColocatedRollouts(
            self.colocated,
            self.prompts,
            self.encoder,
            RowLoader([ROWS], BATCH, seed=1, shuffle=False),
            Sampling(2, 1.0, 8, seed=1),
            self.progress,
            NUM_STEPS,
            self.group_filter,
            self.store,
        )

    def run(self, step: int) -> dict[str, float]:
        return rl_step(self.source, self.learner, self.quarantine, step)


def test_a_step_in_its_order(tmp_path):
    step = Step(tmp_path)
    metrics = step.run(0)
    assert step.events == [
        "forget", "offload", "wake weights", "sync 0", "wake kv_cache", "prefetch 2", "generate 2", "sleep", "restore",
        "learn 2",
    ]  # fmt: skip
    assert metrics["critic/score/mean"] == 0.5 and metrics["actor/num_groups"] == 2.0
    assert metrics["sync/bytes_over_minimum"] == 1.0 and metrics["data/quarantined"] == 0.0
    assert [g.prompt.row.source for g in step.learner.learned[0]] == ["rows.jsonl:0", "rows.jsonl:1"]


def test_parts_of_the_reward_are_averaged_over_the_responses_that_have_them(tmp_path):
    metrics = Step(tmp_path).run(0)
    assert metrics["reward/short"] == 0.5 and metrics["reward/overall"] == 0.5


def test_weights_are_synced_only_when_there_are_new_ones(tmp_path):
    step = Step(tmp_path)
    for number in range(2):
        sample_step(step.source, step.quarantine, number)
    assert [event for event in step.events if event.startswith("sync")] == ["sync 0"]
    step.run(2)
    step.events.clear()
    with step.colocated.awake(3) as report:
        assert report is not None and report.version == 1
    assert "sync 1" in step.events


def test_nothing_is_read_ahead_after_the_last_step(tmp_path):
    step = Step(tmp_path)
    for number in range(NUM_STEPS):
        step.run(number)
    assert sum(event.startswith("prefetch") for event in step.events) == NUM_STEPS - 1


def informative(prompt: Prompt) -> tuple[str, str]:
    """Every third prompt teaches something."""
    return ("yes", "no") if prompt.prompt_id % 3 == 0 else ("no", "no")


def test_dynamic_sampling_goes_on_until_the_batch_is_full(tmp_path):
    step = Step(tmp_path, informative, group_filter=GroupFilter(0.01, 0.99, max_rounds=4))
    metrics = step.run(NUM_STEPS - 1)
    assert [g.prompt.prompt_id for g in step.learner.learned[0]] == [0, 3]
    assert metrics["rollout/num_groups"] == 4.0 and metrics["rollout/dropped_groups"] == 2.0
    assert metrics["critic/score/mean"] == 0.25, "of all sampled groups"


def test_dynamic_sampling_gives_up_with_a_message(tmp_path):
    step = Step(tmp_path, lambda prompt: ("no", "no"), group_filter=GroupFilter(0.01, 0.99, max_rounds=2))
    with pytest.raises(ValueError, match="algorithm.max_filter_rounds=2: only 0 of 2 groups were informative"):
        step.run(0)
    assert step.events[-2:] == ["sleep", "restore"]


def test_rows_that_cannot_be_used_are_set_aside(tmp_path):
    step = Step(tmp_path, broken=frozenset({"1.mp4"}))
    metrics = step.run(0)
    assert metrics["data/bad_media"] == 1.0 and metrics["rollout/num_groups"] == 1.0
    assert "1.mp4: cut off" in step.quarantine.path.read_text()


def test_too_many_bad_rows_stop_the_run_and_leave_the_engine_asleep(tmp_path):
    step = Step(tmp_path, broken=frozenset({"0.mp4", "1.mp4"}))
    with pytest.raises(ValueError, match="data.max_bad_fraction=0.5: 2 of 2 rows of step 0"):
        step.run(0)
    assert step.events[-2:] == ["sleep", "restore"]


def test_a_failed_sync_leaves_the_engine_asleep_and_without_weights(tmp_path):
    step = Step(tmp_path, fails=True)
    with pytest.raises(RuntimeError, match="the link is down"):
        step.run(0)
    assert step.events[-2:] == ["sleep", "restore"] and step.engine.version is None
    assert step.learner.learned == []


def test_a_replayed_step_learns_from_the_saved_groups(tmp_path):
    sampled = Step(tmp_path, store=RolloutStore(tmp_path / "rollouts", writes=True))
    for number in range(2):
        sampled.run(number)
    again = Step(tmp_path)
    store = RolloutStore(tmp_path / "rollouts", writes=False)
    source = ReplayedRollouts(store, again.prompts, again.encoder, again.progress)
    for number in range(2):
        rl_step(source, again.learner, again.quarantine, number)
    assert [list(groups) for groups in again.learner.learned] == [list(groups) for groups in sampled.learner.learned]
    assert not [event for event in again.events if event.startswith(("wake", "sync", "generate"))]
    with pytest.raises(ValueError, match="rollout.replay_from=.*has no step_2.jsonl"):
        rl_step(source, again.learner, again.quarantine, 2)


def test_a_replica_without_prompts_does_not_ask_the_reward(tmp_path):
    """One prompt, two replicas: a reward may be unable to score nothing (numpy.stack raises)."""
    step = Step(tmp_path)
    asked: list[int] = []

    def counted(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        asked.append(len(completions))
        return reward(prompts, completions)

    step.engine.weights_changed(0)
    second = ParallelMesh(1, Grid(2), Grid(2))
    sampling = Sampling(2, 1.0, 8, seed=1, weights_version=0)
    prompt = Prompt(0, ROWS[0], (1, 2))
    assert generate([], step.encoder, step.engine, counted, sampling, second) == []
    assert len(generate([prompt], step.encoder, step.engine, counted, sampling, MESH)) == 1
    assert asked == [2]


def test_a_replayed_step_refuses_other_videos(tmp_path):
    sampled = Step(tmp_path, store=RolloutStore(tmp_path / "rollouts", writes=True))
    sampled.run(0)
    other = Step(tmp_path)
    other.prompts._builder = ReencodedBuilder()
    store = RolloutStore(tmp_path / "rollouts", writes=False)
    source = ReplayedRollouts(store, other.prompts, other.encoder, other.progress)
    with pytest.raises(ValueError, match="behind 2 prompts are not those of the saved rollouts"):
        rl_step(source, other.learner, other.quarantine, 0)


class ReencodedBuilder(Builder):
    """The same rows, whose videos are other files now."""

    def build(self, prompt_id: int, row: Row) -> Prompt:
        prompt = super().build(prompt_id, row)
        [item] = prompt.media
        return replace(prompt, media=(replace(item, key="other"),))


@pytest.mark.parametrize(("every", "at_end", "expected"), [(0, True, [2]), (1, False, [0, 1, 2]), (2, True, [1, 2])])
def test_evaluation_is_due_when_the_recipe_says(every, at_end, expected):
    plan = EvaluationPlan(every, at_start=False, at_end=at_end, blind=False, batch_size=4, num_steps=NUM_STEPS)
    assert [step for step in range(NUM_STEPS) if plan.is_due(step)] == expected


def test_evaluation_answers_every_row_once_and_blind_at_the_end(tmp_path):
    step = Step(tmp_path, lambda prompt: ("yes",))
    plan = EvaluationPlan(0, at_start=True, at_end=True, blind=True, batch_size=3, num_steps=NUM_STEPS)
    answers = RolloutStore(tmp_path / "eval", writes=True)
    evaluation = Evaluation(
        step.colocated, step.prompts, step.encoder, ROWS, "eval", Sampling(1, 1.0, 8, 1, greedy=True), plan, answers,
        step.progress,
    )  # fmt: skip
    assert evaluation.at_start()["eval/start_accuracy"] == 1.0
    assert evaluation.after_step(0) == {}
    results = evaluation.after_step(NUM_STEPS - 1)
    assert results["eval/accuracy"] == results["eval/blind_accuracy"] == 1.0 and results["eval/num_prompts"] == 8.0
    assert [group.prompt.row for group in evaluation.groups] == ROWS
    assert len(answers.load(NUM_STEPS)) == len(ROWS)
