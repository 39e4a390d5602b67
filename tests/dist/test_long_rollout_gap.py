# SPDX-License-Identifier: Apache-2.0
"""I1 at length: trainer and engine score the answers to a video of more than 16,000 tokens alike.

The trainer shares the prompt among the answers and spreads it over context parallel ranks; vLLM prefills it as it does.
The video exists as embeddings only: decoding and encoding are tested elsewhere.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import ParallelConfig, RlConfig
from megatron_rl.rl_session import build_engine
from megatron_rl.session import open_session
from megatron_rl.training.batch import pack
from megatron_rl.types import Completion, EncodedMedia, Sampling, TrainSample
from tests.rollout_parts import small_config, video_prompt
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

GRID = (1024, 8, 8)  # 16,384 language tokens
MAX_TOKENS = 16_640
NUM_SAMPLES = 4


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2.5-VL with room for 32,768 positions."""
    from scripts.make_tiny_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "long"
    write_checkpoint(folder, seed=0, max_positions=32_768)
    return folder


def _gaps(rank: int, cfg: RlConfig) -> tuple[torch.Tensor, int]:
    """(trainer - engine of this rank's response tokens, rows of this rank)."""
    with open_session(cfg, cfg.rollout.temperature) as session:
        engine, resharder = build_engine(cfg, session)
        prompt = video_prompt(0, session.provider, GRID)
        generator = torch.Generator().manual_seed(1)
        width = session.provider.shape.hidden_size
        made = torch.randn(prompt.media[0].num_tokens, width, generator=generator).to(session.backend.dtype)
        embeds = {prompt.media[0].key: made}
        resharder.sync(session.policy.version)
        engine.weights_changed(session.policy.version)
        completions = engine.generate(
            [prompt], EncodedMedia(embeds), Sampling(NUM_SAMPLES, cfg.rollout.temperature, 12, seed=1)
        )
        samples = [TrainSample(prompt, c.token_ids, c.logprobs) for c in _everywhere(completions)]
        [batch] = pack([samples], 1, MAX_TOKENS, session.provider, session.mesh)[0].batches
        [scores] = session.policy.logprobs([batch], embeds)
        return scores - batch.rollout_logprobs, batch.attention.num_queries


def _everywhere(completions: list[Completion]) -> list[Completion]:
    """Those of the first rank: where replicas sampled apart, all train on the same."""
    shared = [completions]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _config(checkpoint: Path, run_dir: Path, dtype: Literal["float32", "bfloat16"], context: int) -> RlConfig:
    cfg = small_config(checkpoint, run_dir, dtype=dtype)
    return replace(
        cfg,
        parallel=ParallelConfig(context=context),
        data=replace(cfg.data, max_prompt_tokens=16_500),
        rollout=replace(cfg.rollout, kv_cache_gib=64 / 1024),
        train=replace(cfg.train, max_tokens_per_microbatch=MAX_TOKENS),
    )


def test_a_long_video_prompt_in_fp32(long_checkpoint: Path, tmp_path: Path) -> None:
    ranks = run_world(2, _gaps, _config(long_checkpoint, tmp_path, "float32", 2), timeout=300)
    gaps = torch.cat([gap for gap, _ in ranks])
    assert len(gaps) >= NUM_SAMPLES and float(gaps.abs().max()) <= 1e-4
    rows = [num_rows for _, num_rows in ranks]
    assert sum(rows) == 16_384 + 5 + len(gaps) and max(rows) <= 1.05 * sum(rows) / 2  # the prompt once


def test_a_long_video_prompt_in_bfloat16(
    long_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [(gaps, _)] = run_world(1, _gaps, _config(long_checkpoint, tmp_path, "bfloat16", 1), timeout=300)
    error = float(gaps.float().abs().exp().mean())
    with capsys.disabled():
        sys.stdout.write(f"\nbf16, 16k-token video: token_mult_prob_error {error:.4f}\n")
    assert error < 1.05
