# SPDX-License-Identifier: Apache-2.0
"""kill -9 and SIGTERM in every phase of every job: ended or saved soon, the rank and its phase named, nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_rl.config.schema import CheckpointConfig, EvalConfig, JobConfig, OptimizerConfig, RewardConfig, RlConfig
from megatron_rl.runtime.watchdog import EXIT_CODE, Watchdog
from tests.rollout_parts import as_sft, small_config
from tests.world import WorldFailed, run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

REWARD = """
def variety(prompts, completions):
    return [{"overall": len(set(c.token_ids)) / 12, "accuracy": 0.5} for c in completions]
"""
Job = Callable[[JobConfig], object]


def _train(cfg: JobConfig) -> None:
    from megatron_rl.train import run

    assert isinstance(cfg, RlConfig)
    run(cfg)


def _sft(cfg: JobConfig) -> None:
    from megatron_rl.sft import run

    run(cfg)  # type: ignore[arg-type]


def _cache(cfg: JobConfig) -> None:
    from megatron_rl.cache_videos import run

    run(cfg)


JOBS: dict[str, Job] = {"train": _train, "sft": _sft, "cache": _cache}


def _config(job: str, checkpoint: Path, videos: Path, folder: Path) -> JobConfig:
    """Two steps of two prompts, evaluated and saved after each, exported; one rank's own file of its words."""
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    cfg = small_config(checkpoint, folder / "run", tensor=2, rollout_tensor=2)
    cfg = replace(
        cfg,
        data=replace(cfg.data, train=str(videos / "train.jsonl"), eval=str(videos / "eval.jsonl")),
        train=replace(cfg.train, prompts_per_step=2, optimizer=OptimizerConfig(lr=1e-3)),
        reward=RewardConfig(name=f"{folder}/reward.py:variety"),
        eval=EvalConfig(every=1, at_start=True, blind=True, batch_size=2),
        checkpoint=CheckpointConfig(every=1, export_hf=True),
    )
    if job == "cache":
        data = replace(cfg.data, cache_dir=str(folder / "cache"))
        return replace(cfg, data=data, train=replace(cfg.train, prompts_per_step=200))
    return as_sft(replace(cfg, data=replace(cfg.data, eval=""))) if job == "sft" else cfg


def _speak_into(path: Path) -> None:
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)


def _signalled(rank: int, job: str, cfg: JobConfig, victim: int, number: int, step: int, phase: str) -> None:
    """The job, in which `victim` gets a signal as soon as it has said that it is in `phase` of `step`."""
    _speak_into(Path(cfg.run_dir).parent / f"words{rank}")
    original = Watchdog.set_phase

    def set_phase(self: Watchdog, now: int, name: str) -> None:
        original(self, now, name)
        if rank == victim and (now, name) == (step, phase):
            os.kill(os.getpid(), number)

    Watchdog.set_phase = set_phase  # type: ignore[method-assign]
    JOBS[job](cfg)


def _plain(rank: int, job: str, cfg: JobConfig) -> None:
    JOBS[job](cfg)


def _rows(cfg: JobConfig) -> list[dict[str, float]]:
    """All metrics but times and what a fresh engine must be sent."""
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    left_out = ("timing_s/", "sync/", "vision/", "eval_vision/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(left_out)} for line in lines]


@pytest.fixture(scope="module")
def whole(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path_factory: pytest.TempPathFactory, heavy_imports: None
) -> Callable[[str], list[dict[str, float]]]:
    """The metrics of a job that nobody disturbed."""
    known: dict[str, list[dict[str, float]]] = {}

    def rows_of(job: str) -> list[dict[str, float]]:
        if job not in known:
            cfg = _config(job, tiny_checkpoint, tiny_videos, tmp_path_factory.mktemp(job))
            run_world(2, _plain, job, cfg)
            known[job] = _rows(cfg)
        return known[job]

    return rows_of


FAST = {("train", "gen"), ("sft", "save_checkpoint"), ("cache", "encode")}
PHASES = [
    *[("train", 0, phase) for phase in ("groups", "model", "engine", "eval", "sync", "encode", "gen")],
    *[("train", 1, phase) for phase in ("update_actor", "eval", "eval_blind", "save_checkpoint", "export_hf", "close")],
    *[("sft", 0, phase) for phase in ("groups", "model", "encode", "update_actor", "save_checkpoint")],
    *[("sft", 1, phase) for phase in ("export_hf", "close")],
    *[("cache", 0, phase) for phase in ("model", "encode", "close")],
]
CASES = [
    pytest.param(*case, marks=[] if (case[0], case[2]) in FAST else [pytest.mark.full], id="-".join(map(str, case)))
    for case in PHASES
]


@pytest.mark.parametrize(("job", "step", "phase"), CASES)
def test_a_rank_killed_in_any_phase_is_named_and_the_run_goes_on(
    job: str, step: int, phase: str, tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path, whole
) -> None:
    cfg = _config(job, tiny_checkpoint, tiny_videos, tmp_path / "job")
    with pytest.raises(WorldFailed) as failure:
        run_world(2, _signalled, job, cfg, 1, signal.SIGKILL, step, phase, grace=30)
    failures = failure.value.failures
    assert failures.pop(1) == "killed by SIGKILL"
    words = (tmp_path / "job/words0").read_text() + failures[0]  # it ends by itself, or by an error that is explained
    assert failures[0] == f"exited with status {EXIT_CODE}" or "PeerLost" in failures[0]
    assert re.search(
        rf"rank 1 \(pid \d+ on \S+\) is gone: last seen in phase '{phase}' of step {step}; stopping", words
    )
    run_world(2, _plain, job, cfg)
    if job != "cache":
        assert _rows(cfg) == whole(job)


STOPS = [
    ("engine", 0, 0, ["asked to stop before step 1"]),
    ("update_actor", 0, 1, ["asked to stop"]),
    ("save_checkpoint", 0, 1, ["asked to stop; step 1 is saved"]),
]


@pytest.mark.parametrize(("phase", "step", "num_rows", "said"), [STOPS[1], *[
    pytest.param(*stop, marks=pytest.mark.full) for stop in (STOPS[0], STOPS[2])
]])  # fmt: skip
def test_a_request_to_stop_is_seen_before_the_next_long_phase(
    phase: str,
    step: int,
    num_rows: int,
    said: list[str],
    tiny_checkpoint: Path,
    tiny_videos: Path,
    tmp_path: Path,
    whole,
) -> None:
    """After start-up, before an evaluation, after a save; what was left out is made up for."""
    cfg = _config("train", tiny_checkpoint, tiny_videos, tmp_path / "job")
    run_world(2, _signalled, "train", cfg, 1, signal.SIGTERM, step, phase)
    words = (tmp_path / "job/words0").read_text()
    assert all(text in words for text in said) and "held-out accuracy after step 2" not in words
    rows = _rows(cfg)
    assert len(rows) == num_rows and ("eval/accuracy" in rows[0] if phase == "save_checkpoint" else True)
    assert phase != "update_actor" or "eval/accuracy" not in rows[0]
    assert sorted(path.name for path in (tmp_path / "job/run").glob("checkpoints/step_*")) == ["step_1"][:num_rows]
    run_world(2, _plain, "train", cfg)
    assert _rows(cfg) == whole("train")
    assert sorted(path.name for path in (tmp_path / "job/run/eval").iterdir()) == [f"step_{n}.jsonl" for n in range(3)]


def _stuck(rank: int, folder: Path, body: Callable[[int], None], limit_s: float) -> None:
    import torch.distributed as dist

    _speak_into(folder / f"words{rank}")
    dist.init_process_group("gloo")
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))
    with Watchdog(rank, 2, store, interval_s=0.1, patience_s=3.0, limit_s=limit_s, floor_s=1.0) as watchdog:
        watchdog.set_phase(12, "gen")
        body(rank)


def _a_reward_that_hangs() -> None:
    time.sleep(600)


def _a_pattern_that_never_lets_go() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def _hang(rank: int, hangs: Callable[[], None]) -> None:
    import torch
    import torch.distributed as dist

    hangs() if rank == 0 else dist.all_reduce(torch.ones(1))


def test_a_main_thread_that_is_stuck_is_named_with_its_stack_and_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed) as failure:
        run_world(2, _stuck, tmp_path, partial(_hang, hangs=_a_reward_that_hangs), 2.0, grace=30)
    ended = failure.value.failures
    assert ended[0] == f"exited with status {EXIT_CODE}"
    assert ended[1] == ended[0] or "PeerLost" in ended[1]  # its collective may break before its watchdog speaks
    stuck, waiting = ((tmp_path / f"words{rank}").read_text() for rank in (0, 1))
    [told] = re.findall(r"^rank 0 has been .*$", stuck, re.MULTILINE)
    assert re.fullmatch(
        r"rank 0 has been in phase 'gen' of step 12 for 1 s \(for the first time\); its main thread is here:", told
    )
    assert "in _a_reward_that_hangs\n" in stuck
    [told] = re.findall(r"^rank 1 has been .*$", waiting, re.MULTILINE)
    assert told.endswith("(for the first time); it waits for other ranks in all_reduce") and "Traceback" not in waiting
    for words in (stuck, waiting + ended[1]):
        assert re.search(
            r"rank 0 has been in phase 'gen' of step 12 for 2 s, longer than max_phase_minutes=0\.0333333; stopping\. "
            r"Run the same command",
            words,
        )


def test_a_main_thread_that_holds_the_interpreter_shows_its_stack(tmp_path: Path) -> None:
    with pytest.raises(WorldFailed) as failure:
        run_world(2, _stuck, tmp_path, partial(_hang, hangs=_a_pattern_that_never_lets_go), 0.0, grace=0.5)
    assert failure.value.failures == {1: f"exited with status {EXIT_CODE}"}
    assert "in _a_pattern_that_never_lets_go" in (tmp_path / "words0").read_text()
    assert "has not answered for 3 s: last seen in phase 'gen' of step 12" in (tmp_path / "words1").read_text()
