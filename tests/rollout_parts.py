# SPDX-License-Identifier: Apache-2.0
"""What the tests of the rollout half share: a small configuration, prompts of every kind, an engine on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data.rows.dataset import read_rows
from megatron_rl.config.schema import (
    DataConfig,
    JobConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RlConfig,
    RolloutConfig,
    SftConfig,
    SftTrainConfig,
    TrainConfig,
)
from megatron_rl.protocols import ModelProvider
from megatron_rl.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_rl.runtime.device import choose_backend
from megatron_rl.types import MediaItem, Prompt, Row
from model_providers.hf_files import canonical_hf_name
from model_providers.provider import open_provider

KV_CACHE_BYTES = 8 << 20


def small_config(
    checkpoint: Path,
    run_dir: Path,
    tensor: int = 1,
    pipeline: int = 1,
    rollout_tensor: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> RlConfig:
    """Prompts of at most 512 tokens, 4 responses of 12 tokens each."""
    return RlConfig(
        run_dir=str(run_dir),
        device="cpu",
        model=ModelConfig(hf=str(checkpoint), dtype=dtype),
        data=DataConfig(num_frames=4, min_pixels=3136, max_pixels=3136, max_prompt_tokens=512),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        rollout=RolloutConfig(
            tensor=rollout_tensor,
            num_samples=4,
            temperature=0.8,
            max_response_tokens=12,
            max_num_seqs=32,
            kv_cache_gib=KV_CACHE_BYTES / 2**30,
            enforce_eager=True,
        ),
        train=TrainConfig(num_steps=2, max_tokens_per_microbatch=1024),
        log=LogConfig(wandb="off", tensorboard=False),
    )


def as_sft(cfg: RlConfig) -> SftConfig:
    """SFT with the settings that it shares with RL; answers may be as long as the responses."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(JobConfig) if f.name != "train"}
    train = {f.name: getattr(cfg.train, f.name) for f in fields(TrainConfig)}
    return SftConfig(**shared, train=SftTrainConfig(**train, max_answer_tokens=cfg.rollout.max_response_tokens))


def mixed_rows(videos: Path) -> list[Row]:
    """One video, text only, two videos."""
    [found] = read_rows(str(videos / "train.jsonl"), "", videos / "media")
    rows = found.rows
    assert not found.bad
    text = Row("text:1", "What is two plus two?", "4")
    two = Row("two:1", "First <video> then <video> what changed?", "A", rows[1].videos + rows[2].videos)
    return [rows[0], text, two]


def slowed_down(prompt: Prompt, seconds_per_grid: float) -> Prompt:
    """The same pictures, so far apart that temporal positions outgrow the spatial ones."""
    media = tuple(
        replace(v, key=f"{v.key}:{seconds_per_grid}", seconds_per_grid=seconds_per_grid) for v in prompt.media
    )
    return replace(prompt, prompt_id=prompt.prompt_id + 1000, media=media)


def text_prompt(prompt_id: int, token_ids: Sequence[int]) -> Prompt:
    return Prompt(prompt_id, Row(f"text:{prompt_id}", "", ""), tuple(token_ids))


def video_prompt(
    prompt_id: int,
    provider: ModelProvider,
    grid_thw: tuple[int, int, int],
    key: str = "video",
    seconds_per_grid: float = 1.0,
) -> Prompt:
    """A prompt around a video that exists as embeddings only."""
    spec = provider.specs.pictures
    assert spec is not None
    per_unit = spec.tokens_per_unit((grid_thw[1] * spec.patch_size, grid_thw[2] * spec.patch_size))
    num_tokens, num_frames = grid_thw[0] * per_unit, 2 * grid_thw[0]
    video = MediaItem(
        key, f"{key}.mp4", (), (), (0, 0), grid_thw, seconds_per_grid, num_tokens, num_frames, 2, per_unit
    )
    ids = (10, 11, 12, *spec.placeholder(video).token_ids, 20, 21)
    return Prompt(prompt_id, Row(f"video:{prompt_id}", "", ""), ids, (video,), (((3, 3 + num_tokens),),))


def join_world() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def open_plain_engine(
    folder: Path,
    tensor: int = 1,
    max_model_len: int = 256,
    eos_token_ids: Sequence[int] = (),
) -> VllmEngine:
    """An engine with vLLM's random start weights and no trainer beside it."""
    join_world()
    provider = open_provider(folder)
    settings = EngineSettings(
        model=provider.engine,
        tensor=tensor,
        max_model_len=max_model_len,
        max_num_seqs=32,
        kv_cache_bytes=max(KV_CACHE_BYTES, max_model_len * 4096),
        gpu_memory_utilization=0.1,
        enforce_eager=True,
    )
    return VllmEngine(
        settings,
        choose_backend("cpu", "float32"),
        provider.forbidden_tokens,
        eos_token_ids,
        provider.position_ids,
        lambda ids: " ".join(map(str, ids)),
    )


def language_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """{HF name: tensor} of a checkpoint, vision tower left out."""
    tensors = {canonical_hf_name(name): t for name, t in load_file(folder / "model.safetensors").items()}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}


def fill_with_hf_weights(engine: VllmEngine, folder: Path, version: int = 0) -> None:
    """Weights through vLLM's own loader."""
    engine.load_hf(iter(language_tensors(folder).items()))
    engine.weights_changed(version)
