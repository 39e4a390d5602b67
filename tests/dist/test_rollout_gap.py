# SPDX-License-Identifier: Apache-2.0
"""Trainer and engine must score the same tokens alike: every kind of prompt, every layout, before and after an update.

The whole chain is real: mp4 files, DALI, vision tower, resharder, vLLM, packing, Megatron-core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.config.schema import RlConfig
from megatron_rl.rl_session import build_engine
from megatron_rl.session import Session, open_session
from megatron_rl.training.batch import ScoredBatch, pack
from megatron_rl.training.microbatch import MicroBatch
from megatron_rl.types import Completion, Prompt, Row, Sampling, TrainSample
from tests.rollout_parts import mixed_rows, slowed_down, small_config
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")


@dataclass(frozen=True)
class Gaps:
    """Differences trainer - engine of every response token on this rank; `moved` = effect of the update on them."""

    before: torch.Tensor
    after: torch.Tensor
    moved: torch.Tensor
    num_sampled: int
    num_prompts_with_video: int


def _measure(rank: int, cfg: RlConfig, rows: list[Row]) -> Gaps:
    with open_session(cfg, cfg.rollout.temperature) as session:
        return _measure_in(session, cfg, rows)


def _measure_in(session: Session, cfg: RlConfig, rows: list[Row]) -> Gaps:
    engine, resharder = build_engine(cfg, session)
    prompts, bad = session.prompts.take(list(enumerate(rows)))
    assert not bad
    prompts += [slowed_down(p, 40.0) for p in prompts if p.media]
    assert session.encoder.encode([v for p in prompts for v in p.media]) == {}
    mine = prompts[session.mesh.replica :: session.mesh.num_replicas]
    embeds = session.encoder.fetch([v for p in mine for v in p.media])

    def sample(step: int) -> list[Completion]:
        resharder.sync(session.policy.version)
        engine.weights_changed(session.policy.version)
        return engine.generate(mine, embeds, Sampling(4, cfg.rollout.temperature, 12, seed=1, step=step))

    first = sample(0)
    before, batches, old = _trainer_minus_engine(cfg, session, prompts, first)
    everywhere = session.encoder.fetch([v for p in prompts for v in p.media]).tables
    scored = [ScoredBatch(b, o, None, _alternating(b)) for b, o in zip(batches, old, strict=True)]
    session.policy.train(scored, everywhere, PpoClip(), step=0)
    new = session.policy.logprobs(batches, everywhere)
    moved = [n - o for n, o in zip(new, old, strict=True) if n is not None and o is not None]
    after, _, _ = _trainer_minus_engine(cfg, session, prompts, sample(1))
    return Gaps(before, after, torch.cat([torch.zeros(0), *moved]), len(first), sum(bool(p.media) for p in mine))


def _trainer_minus_engine(cfg: RlConfig, session: Session, prompts: list[Prompt], mine: list[Completion]):
    """(differences on this rank, its micro-batches, the trainer's log-probabilities)."""
    everyone: list[list[Completion]] = [[] for _ in range(session.mesh.world)]
    dist.all_gather_object(everyone, mine if session.mesh.speaks_for_replica else [])
    by_id = {p.prompt_id: p for p in prompts}
    samples = [TrainSample(by_id[c.prompt_id], c.token_ids, c.logprobs) for part in everyone for c in part]
    batches = pack([samples], 1, cfg.train.max_tokens_per_microbatch, session.provider, session.mesh)[0].batches
    embeds = session.encoder.fetch([v for b in batches for v in b.media]).tables
    scores = session.policy.logprobs(batches, embeds)
    pairs = zip(scores, batches, strict=True)
    gaps = [score - batch.rollout_logprobs for score, batch in pairs if score is not None]
    return torch.cat([torch.zeros(0), *gaps]), batches, scores


def _alternating(batch: MicroBatch) -> torch.Tensor:
    """Advantages 1 and -1 in turn: an update that moves the policy."""
    return (-1.0) ** torch.arange(batch.num_response_tokens)


NUM_PROMPTS, NUM_SAMPLES = 5, 4
LAYOUTS = {  # name: (world, trainer tp, trainer pp, trainer cp, engine tp)
    "tp2-to-tp2": (2, 2, 1, 1, 2),
    "pp2-to-tp2": (2, 1, 2, 1, 2),
    "cp2-to-tp2": (2, 1, 1, 2, 2),
    "dp2-to-two-replicas": (2, 1, 1, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_scores_what_the_engine_sampled(
    layout: str, tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path
) -> None:
    world, tensor, pipeline, context, rollout_tensor = LAYOUTS[layout]
    cfg = small_config(tiny_checkpoint, tmp_path, tensor, pipeline, rollout_tensor)
    cfg = replace(cfg, parallel=replace(cfg.parallel, context=context))
    cfg = replace(cfg, train=replace(cfg.train, optimizer=replace(cfg.train.optimizer, lr=1e-2)))
    gaps = run_world(world, _measure, cfg, mixed_rows(tiny_videos), timeout=120)
    before, after = (torch.cat([getattr(g, name) for g in gaps]) for name in ("before", "after"))
    assert sum(g.num_sampled for g in gaps) == NUM_PROMPTS * NUM_SAMPLES * rollout_tensor
    assert all(g.num_prompts_with_video for g in gaps)
    assert len(before) > 100 and len(after) > 100
    assert float(before.abs().max()) <= 1e-4
    assert float(after.abs().max()) <= 1e-4
    assert float(torch.cat([g.moved for g in gaps]).abs().max()) > 0.1, (
        "the update was too small to notice stale weights"
    )


def test_images_alone_and_among_videos_are_scored_alike(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path
) -> None:
    """vLLM places images and videos itself: a wrong order, placeholder or position would show."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(((90, 60), (60, 140))):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    video = mixed_rows(tiny_videos)[0].videos
    rows = [
        Row("image:1", "What is this?", "A", images=(paths[0],)),
        Row("images:2", "From <image> to <image> what changed?", "A", images=tuple(paths)),
        Row("both:3", "Is <image> in <video> or is <image>?", "A", video, images=tuple(paths)),
    ]
    cfg = small_config(tiny_checkpoint, tmp_path, 2, 1, 2)
    cfg = replace(cfg, train=replace(cfg.train, optimizer=replace(cfg.train.optimizer, lr=1e-2)))
    for gaps in run_world(2, _measure, cfg, rows, timeout=120):
        assert gaps.num_prompts_with_video == 6 and len(gaps.before) > 100
        assert float(gaps.before.abs().max()) <= 1e-4 and float(gaps.after.abs().max()) <= 1e-4


def test_bfloat16_stays_within_the_usual_multiplicative_error(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small_config(tiny_checkpoint, tmp_path, dtype="bfloat16")
    [gaps] = run_world(1, _measure, cfg, mixed_rows(tiny_videos), timeout=120)
    differences = torch.cat([gaps.before, gaps.after]).abs()
    error = float(differences.exp().mean())
    with capsys.disabled():
        sys.stdout.write(
            f"\nbf16 token_mult_prob_error {error:.4f}, largest log-prob gap {float(differences.max()):.4f}\n"
        )
    assert error < 1.05
