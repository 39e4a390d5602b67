# SPDX-License-Identifier: Apache-2.0
"""What one step of a recipe works on: frames, tokens, prompts, and the micro-batches that they are packed into.

Every prompt is taken to hold one video that is long enough, and every response to be equally long: the largest case a
recipe allows, unless the user knows better (`Assumptions`). Lengths are in tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import numpy as np

from data.video.frames import FrameSettings, choose_frames
from megatron_rl.config.schema import RlConfig
from megatron_rl.planner.model import PlannedModel
from megatron_rl.planner.towers import Tower
from megatron_rl.training.packing import attention_weight, build_bundles, plan_packing
from megatron_rl.types import Prompt, Row, TrainSample, VideoInfo
from model_providers.attention.segments import segments_of, shard

FRAMES_A_SECOND = 30.0  # of the video that is assumed


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a recipe does not say. `reserve` bytes a GPU go to CUDA, NCCL and what the allocator cannot use."""

    width: int = 1280
    height: int = 720
    seconds: float = 3600.0
    """Length of a video; matters where frames are taken by data.fps."""
    text_tokens: int = 256
    """Of a prompt, beside the video's."""
    response_tokens: int = 0
    """Of a response; 0 = rollout.max_response_tokens."""
    reserve: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Workload:
    """One step. `text_tokens` stand beside `video_tokens` in a prompt; `response_tokens` are those of one response."""

    num_frames: int
    size_hw: tuple[int, int]
    video_tokens: int
    prompt_tokens: int
    num_prompts: int
    num_samples: int
    response_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of a prompt with one response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def group_tokens(self) -> int:
        """Tokens of a prompt, stored once, with all of its responses."""
        return self.prompt_tokens + self.num_samples * self.response_tokens


@dataclass(frozen=True, slots=True)
class Packing:
    """One optimizer update on the busiest data parallel rank.

    rows: tokens in all, shared prompts once; bundles: of a prompt and the responses that share it, over all updates
    """

    num_microbatches: int
    rows: int
    bundles: int
    responses_a_bundle: float


def workload_of(cfg: RlConfig, model: PlannedModel, assumed: Assumptions) -> Workload:
    responses = assumed.response_tokens or cfg.rollout.max_response_tokens
    if model.tower is None:
        prompt = cfg.data.max_prompt_tokens
        return Workload(0, (0, 0), 0, prompt, cfg.train.prompts_per_step, cfg.rollout.num_samples, responses)
    frames = _num_frames(cfg, model.tower.temporal_patch, assumed)
    size_hw = _size_hw(cfg, model.tower, assumed, frames)
    video = model.tower.tokens(frames, size_hw)
    return Workload(
        num_frames=frames,
        size_hw=size_hw,
        video_tokens=video,
        prompt_tokens=video + assumed.text_tokens,
        num_prompts=cfg.train.prompts_per_step,
        num_samples=cfg.rollout.num_samples,
        response_tokens=responses,
    )


def _num_frames(cfg: RlConfig, multiple: int, assumed: Assumptions) -> int:
    """As data/video/frames.py chooses them from a video of that length, though a number beyond its bound may be asked
    about."""
    data = cfg.data
    if data.num_frames:
        return -(-data.num_frames // multiple) * multiple
    shown = np.arange(0.0, assumed.seconds, 1 / FRAMES_A_SECOND)
    info = VideoInfo("", "", assumed.width, assumed.height, tuple(shown.tolist()), FRAMES_A_SECOND)
    settings = FrameSettings(data.num_frames, data.fps, data.min_frames, data.max_frames)
    return len(choose_frames(info, settings, multiple))


def _size_hw(cfg: RlConfig, tower: Tower, assumed: Assumptions, num_frames: int) -> tuple[int, int]:
    """As a family's MediaSpec does; data.total_pixels is shared evenly by the frames."""
    data, largest = cfg.data, cfg.data.max_pixels
    if data.total_pixels:
        share = data.total_pixels * tower.temporal_patch // num_frames
        largest = max(min(largest, share), int(data.min_pixels * 1.05))
    return tower.size_hw(assumed.height, assumed.width, data.min_pixels, largest)


def workload_problems(cfg: RlConfig, model: PlannedModel, work: Workload) -> list[str]:
    """Settings under which every prompt of this length would be refused or set aside."""
    problems = []
    if work.prompt_tokens > cfg.data.max_prompt_tokens:
        problems.append(
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens}: a prompt has {work.prompt_tokens:,} tokens "
            f"({work.video_tokens:,} of them video) and would be set aside; raise it to that, or take fewer frames "
            "(data.num_frames) or smaller ones (data.max_pixels)"
        )
    longest = cfg.max_model_len
    if longest > model.shape.max_positions:
        problems.append(
            f"data.max_prompt_tokens={cfg.data.max_prompt_tokens}: with the response up to {longest:,} tokens, and "
            f"config.json allows {model.shape.max_positions:,}; lower it, or raise max_position_embeddings in "
            "config.json if the model holds out that long"
        )
    budget = cfg.train.max_tokens_per_microbatch
    if work.longest > budget:
        problems.append(
            f"train.max_tokens_per_microbatch={budget}: a prompt with one response has {work.longest} tokens and must "
            "fit; raise it to that"
        )
    return problems


@functools.lru_cache(maxsize=4096)
def pack_step(
    work: Workload, budget: int, num_ranks: int, hidden_size: int, share: bool, num_updates: int, multiple: int
) -> Packing | None:
    """The trainer's own packing of a step over `num_ranks` data parallel ranks; None where a sequence does not fit."""
    if work.longest > budget:
        return None
    prompts = -(-work.num_prompts // num_updates)
    bundles = build_bundles(_samples(work, prompts), budget, hidden_size, share)
    plan = plan_packing(bundles, num_ranks, budget, multiple)
    tokens = {bundle.members: bundle.num_tokens for bundle in bundles}
    ranks = [[members for part in rank for members in part] for rank in plan.bins]
    rows = [sum(tokens[members] for members in rank) for rank in ranks]
    busiest = ranks[rows.index(max(rows))]
    return Packing(
        num_microbatches=len(plan.bins[0]),
        rows=max(rows),
        bundles=len(busiest) * num_updates,
        responses_a_bundle=sum(map(len, busiest)) / len(busiest),
    )


def _samples(work: Workload, num_prompts: int) -> list[TrainSample]:
    # Packing reads lengths only; a range has one without holding a million numbers.
    ids, response = (cast("tuple[int, ...]", range(n)) for n in (work.prompt_tokens, work.response_tokens))
    row = Row("", "", "")
    return [
        TrainSample(prompt, response, ())
        for prompt in (Prompt(index, row, ids, ()) for index in range(num_prompts))
        for _ in range(work.num_samples)
    ]


@functools.lru_cache(maxsize=4096)
def fullest_share(prompt: int, response: int, num_responses: int, num_ranks: int, hidden_size: int) -> float:
    """Part of a micro-batch's tokens that its fullest context parallel rank holds: 1 / num_ranks where it is even."""
    if num_ranks == 1:
        return 1.0
    segments = segments_of([(prompt, [response] * num_responses)])
    shards = shard(segments, num_ranks, attention_weight(hidden_size))
    return max(sum(run.length for run in held) for held in shards) / (prompt + num_responses * response)
