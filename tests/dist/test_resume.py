# SPDX-License-Identifier: Apache-2.0
"""I6: 2N updates are N updates, a checkpoint, a new process and N more; and no crash costs an earlier checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    SftConfig,
    SftTrainConfig,
)
from megatron_rl.config.schema import OptimizerConfig as OptimizerSettings
from megatron_rl.observe.metric_log import METRICS_FILE, read_metrics
from megatron_rl.training import checkpoint
from tests import tiny_policy as tp
from tests.world import WorldFailed, run_world

Grid = tuple[int, int, int, int]  # tensor, pipeline, data, context
N = 2
STATE = {"loader": {"epoch": 1, "position": 3}, "best": [0.5, 2]}


def _updates(folder: Path, root: Path, grid: Grid, load: int, save: int | None, stop: int) -> Any:
    """Updates load .. stop-1 of one fixed run on this rank; from checkpoint `load` if that is not 0, saving at `save`.

    Returns (nll sums and a random number by step, snapshot, weight pieces, step counts of the optimizer).
    """
    mesh = tp.join(grid[0], grid[1], context=grid[3])
    trainer = tp.open_trainer(folder, mesh)
    policy = trainer.policy
    torch.manual_seed(1000 * load + mesh.rank)
    if load:
        state = checkpoint.load(checkpoint.step_folder(root, load), policy, mesh)
        assert state == {"step": load, "version": load, **STATE} and policy.version == load
    samples = tp.mixed_samples(trainer.provider)
    embeds = tp.random_embeds(samples)
    history = []
    for step in range(load, stop):
        batches = trainer.pack(samples[step % 3 :], max_tokens=64)
        metrics = policy.train(tp.unscored(batches), embeds, NllLoss(), step)
        history.append((metrics.get("sft/nll", (0.0, 0.0)), float(torch.rand(()))))
        if step + 1 == save:
            checkpoint.save(root, save, policy, mesh, STATE, hf_source=str(folder))
    counts = {group["step"] for group in policy.optimizer.param_groups}
    return history, tp.snapshot(policy), tp.weights(trainer), counts


def _run(folder: Path, root: Path, grid: Grid, load: int = 0, save: int | None = None, stop: int = 2 * N) -> list[Any]:
    ranks = run_world(math.prod(grid), lambda _: _updates(folder, root, grid, load, save, stop))
    assert all(counts == {stop} for *_, counts in ranks), "one optimizer step an update, whatever was loaded"
    return ranks


def _losses(ranks: list[Any]) -> list[float]:
    """Mean over all tokens of all data parallel ranks, by step."""
    by_step = zip(*([nll for nll, _ in history] for history, *_ in ranks), strict=True)
    return [sum(top for top, _ in step) / sum(bottom for _, bottom in step) for step in by_step]


def _assert_bit_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def _name(grid: Grid) -> str:
    return "tp{}_pp{}_dp{}_cp{}".format(*grid)


@pytest.mark.parametrize("grid", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)], ids=_name)
def test_same_layout_to_the_bit(tiny_checkpoint: Path, tmp_path: Path, grid: Grid) -> None:
    """Weights, optimizer state, losses and random numbers; and saving itself changes nothing."""
    straight = _run(tiny_checkpoint, tmp_path, grid)
    _run(tiny_checkpoint, tmp_path, grid, save=N, stop=N)
    resumed = _run(tiny_checkpoint, tmp_path, grid, load=N)
    for (history, snapshot, *_), (expected_history, expected_snapshot, *_) in zip(resumed, straight, strict=True):
        assert history == expected_history[N:]
        _assert_bit_equal(snapshot, expected_snapshot)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1, 1, 1), (1, 2, 1, 1)),
        ((2, 1, 1, 1), (1, 1, 2, 1)),
        ((2, 1, 1, 1), (1, 1, 1, 1)),
        ((1, 1, 2, 1), (2, 2, 1, 1)),
        ((1, 1, 1, 2), (2, 1, 1, 1)),
        ((2, 1, 1, 1), (1, 1, 1, 4)),
    ],
    ids=_name,
)
def test_other_layout(tiny_checkpoint: Path, tmp_path: Path, before: Grid, after: Grid) -> None:
    straight = _run(tiny_checkpoint, tmp_path, before, save=N)
    resumed = _run(tiny_checkpoint, tmp_path, after, load=N)
    losses = _losses(straight)
    assert _losses(resumed) == pytest.approx(losses[N:], rel=1e-5)
    assert abs(losses[-1] - losses[N]) > 1e-2, "the updates must matter to the loss"
    provider = tp.open_provider(tiny_checkpoint)
    full, expected = (tp.assemble(provider, [pieces for _, _, pieces, _ in ranks]) for ranks in (resumed, straight))
    errors = tp.relative_errors(full, expected)
    assert max(errors.values()) <= 1e-4, errors


def test_tied_embeddings_at_another_layout(tied_checkpoint: Path, tmp_path: Path) -> None:
    straight = _run(tied_checkpoint, tmp_path, (1, 2, 1, 1), save=N)
    resumed = _run(tied_checkpoint, tmp_path, (2, 1, 1, 1), load=N)
    assert _losses(resumed) == pytest.approx(_losses(straight)[N:], rel=1e-5)


def _save_at_once(folder: Path, root: Path) -> None:
    mesh = tp.join(tensor=2)
    checkpoint.save(root, 1, tp.open_trainer(folder, mesh).policy, mesh, {}, hf_source=str(folder))


def _two_updates(folder: Path, root: Path, load: bool) -> dict[str, Tensor]:
    mesh = tp.join(tensor=2)
    trainer = tp.open_trainer(folder, mesh)
    if load:
        assert checkpoint.load(checkpoint.step_folder(root, 1), trainer.policy, mesh)["version"] == 0
    samples = tp.mixed_samples(trainer.provider)
    for step in range(2):
        trainer.policy.train(tp.unscored(trainer.pack(samples)), tp.random_embeds(samples), NllLoss(), step)
    assert {group["step"] for group in trainer.policy.optimizer.param_groups} == {2}
    return tp.snapshot(trainer.policy)


def test_a_checkpoint_from_before_the_first_update(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What a run that only generates saves at its end."""
    run_world(2, lambda _: _save_at_once(tiny_checkpoint, tmp_path))
    resumed, straight = (
        run_world(2, lambda _, load=load: _two_updates(tiny_checkpoint, tmp_path, load)) for load in (True, False)
    )
    for ours, expected in zip(resumed, straight, strict=True):
        _assert_bit_equal(ours, expected)


def _die_while_saving(folder: Path, root: Path, moment: str) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        if moment == "half of the tensors written":
            (Path(args[1]) / "half.distcp").write_bytes(b"\0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half of the tensors written":
        checkpoint.dist_checkpointing.save = die
    else:
        checkpoint._flush = die
    _updates(folder, root, (1, 1, 1, 1), load=N, save=2 * N, stop=2 * N)


@pytest.mark.parametrize("moment", ["half of the tensors written", "all written, not yet renamed"])
def test_a_kill_while_saving_costs_nothing_that_was_saved(tiny_checkpoint: Path, tmp_path: Path, moment: str) -> None:
    straight = _run(tiny_checkpoint, tmp_path, (1, 1, 1, 1), save=N)
    with pytest.raises(WorldFailed, match="rank 0 of 1: killed by SIGKILL"):
        run_world(1, lambda _: _die_while_saving(tiny_checkpoint, tmp_path, moment))
    assert checkpoint.list_steps(tmp_path) == [N]
    partial = tmp_path / f"step_{2 * N}.partial"
    assert any(partial.iterdir())

    resumed = _run(tiny_checkpoint, tmp_path, (1, 1, 1, 1), load=N, save=2 * N)  # over what the crash left behind
    _assert_bit_equal(resumed[0][1], straight[0][1])
    assert checkpoint.list_steps(tmp_path) == [N, 2 * N]
    assert not partial.exists() and not (tmp_path / f"step_{2 * N}" / "half.distcp").exists()
    _run(tiny_checkpoint, tmp_path, (1, 1, 1, 1), load=2 * N, stop=2 * N + 1)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [10, 12]), (2, 2, [2, 10, 12]), (2, 12, [10, 12]), (1, 9, [9, 12]), (9, None, [1, 2, 9, 10, 12])],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for name in ("step_1", "step_2", "step_9", "step_10", "step_12", "step_14.partial", "step_x"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, keep, best)
    assert checkpoint.list_steps(tmp_path) == left
    assert (tmp_path / "step_14.partial").is_dir() and (tmp_path / "step_x").is_dir()


def _sft_config(checkpoint_folder: Path, videos: Path, run_dir: Path) -> SftConfig:
    return SftConfig(
        run_dir=str(run_dir),
        device="cpu",
        model=ModelConfig(hf=str(checkpoint_folder)),
        data=DataConfig(train=str(videos / "train.jsonl"), num_frames=4, min_pixels=3136, max_pixels=3136),
        parallel=ParallelConfig(tensor=2),
        train=SftTrainConfig(
            num_steps=2 * N,
            max_answer_tokens=4,
            prompts_per_step=3,  # of 8 rows: an epoch ends inside the run
            max_tokens_per_microbatch=512,
            optimizer=OptimizerSettings(lr=1e-3),
        ),
        checkpoint=CheckpointConfig(every=N),
        log=LogConfig(wandb="off", tensorboard=False),
    )


def _metrics(cfg: SftConfig) -> list[dict[str, float]]:
    rows = read_metrics(Path(cfg.run_dir) / METRICS_FILE)
    return [{name: value for name, value in row.items() if not name.startswith("timing_s/")} for row in rows]


def test_sft_job_goes_on_where_it_was(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path) -> None:
    """Data order included: the metrics of every step are those of the run that was never interrupted."""
    from megatron_rl import sft

    straight = _sft_config(tiny_checkpoint, tiny_videos, tmp_path / "straight")
    resumed = replace(straight, run_dir=str(tmp_path / "resumed"))
    run_world(2, lambda _: sft.run(straight))
    run_world(2, lambda _: sft.run(replace(resumed, train=replace(resumed.train, num_steps=N))))
    assert len(_metrics(resumed)) == N
    run_world(2, lambda _: sft.run(resumed))
    assert _metrics(resumed) == _metrics(straight)
    assert [row["step"] for row in _metrics(straight)] == list(range(2 * N))
    state = json.loads((Path(resumed.run_dir) / "checkpoints" / f"step_{2 * N}" / checkpoint.STATE_FILE).read_text())
    assert state["step"] == 2 * N


def _other_model(source: Path, target: Path, only: str) -> Path:
    """The same folder with other values in the first tensor whose name begins so."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.startswith(only))
    save_file(tensors | {name: tensors[name] + 1}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_run_does_not_go_on_with_another_model(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path) -> None:
    """Its frozen tower would encode, its weights be the reference of the KL term, and neither was what was trained."""
    from megatron_rl import sft

    cfg = _sft_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    first = replace(cfg, train=replace(cfg.train, num_steps=N))
    run_world(2, lambda _: sft.run(first))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint, changed)
    (changed / "chat_template.jinja").write_text("{{ messages[0].content }}")
    others = {
        _other_model(tiny_checkpoint, tmp_path / "tower", "visual."): "visual.blocks.0.attn.proj.bias",
        _other_model(tiny_checkpoint, tmp_path / "language", "model."): "weights of the language model",
        changed: "chat_template.jinja",
    }
    for folder, what in others.items():
        other = replace(cfg, model=replace(cfg.model, hf=str(folder)))
        with pytest.raises(WorldFailed) as refused:
            run_world(2, lambda _, other=other: sft.run(other), grace=20)
        for rank in (0, 1):
            why = f"model.hf={folder}: is not the model that this run began with (other: {what})"
            assert why in refused.value.failures[rank]
    start = replace(cfg, model=replace(cfg.model, weights_from=f"{cfg.run_dir}/checkpoints"))
    with pytest.raises(WorldFailed, match="this run began with other weights .those of none."):
        run_world(2, lambda _: sft.run(start), grace=20)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [N]
    (tmp_path / "run" / "checkpoints" / "step_9.partial").mkdir()
    run_world(2, lambda _: sft.run(replace(cfg, model=replace(cfg.model, hf=str(moved)))))
    assert [row["step"] for row in _metrics(cfg)] == list(range(2 * N)), "a folder may move"
    assert not (tmp_path / "run" / "checkpoints" / "step_9.partial").exists(), "what a killed save has left"


def test_a_finished_run_says_so(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron_rl import sft

    cfg = _sft_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    run_world(2, lambda _: sft.run(cfg))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "asks for no more" not in capfd.readouterr().out
    run_world(2, lambda _: sft.run(replace(cfg, train=replace(cfg.train, num_steps=1))))
    said = f"run_dir={cfg.run_dir}: has {2 * N} steps, train.num_steps=1 asks for no more; raise it to go on"
    assert capfd.readouterr().out.count(said) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == summary["num_steps"] == 2 * N
