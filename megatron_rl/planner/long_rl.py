# SPDX-License-Identifier: Apache-2.0
"""Long-RL's claim, planned: 3,600 frames, about 256k tokens, of Qwen2.5-VL-3B and LongVILA-7B on 8 x A100-80G.

The work of a step is that of its `qwen2_5_vl_3b_video_1h.sh` (a prompt a GPU, 0.4 of the memory to vLLM), with the
defaults of its config for the rest (5 responses a prompt, 512 tokens each). 256k tokens are 71 a frame. Qwen2.5-VL
makes 72 of a 16:9 frame of 252 x 448 pixels. LongVILA-7B's published script has 257 a frame, which would make 925k of
3,600; it is planned so, and with the 71 that the claim implies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rl.config.schema import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RlConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rl.planner.gpus import Gpu
from megatron_rl.planner.model import PlannedModel, load_planned_model
from megatron_rl.planner.search import (
    FrameLimit,
    Machine,
    Option,
    largest_frames,
    search,
    suggested,
    what_is_missing,
    with_frames,
)
from megatron_rl.planner.workload import Assumptions

NUM_FRAMES, CLAIMED_TOKENS = 3600, 256_000
PIXELS = 252 * 448
WORLDS = (8, 64)


@dataclass(frozen=True, slots=True)
class Claim:
    """`option`: the layout suggested for 3,600 frames, None where none takes them (`why_not`); `limit`: the most that
    fits."""

    title: str
    gpus: int
    tokens_a_frame: int
    num_frames: int
    option: Option | None
    why_not: str
    limit: FrameLimit


def claims(gpu: Gpu, assumed: Assumptions) -> Iterator[Claim]:
    """Both models, the second in both readings, on 8 and on 64 GPUs."""
    for title, model in _models():
        for world in WORLDS:
            yield _claim(title, model, Machine(gpu, world, assumed))


def recipe(num_prompts: int) -> RlConfig:
    return RlConfig(
        run_dir="runs/long_rl",
        model=ModelConfig(hf="", recompute="full"),
        data=DataConfig(num_frames=NUM_FRAMES, min_pixels=PIXELS, max_pixels=PIXELS),
        parallel=ParallelConfig(),
        rollout=RolloutConfig(num_samples=5, max_response_tokens=512, gpu_memory_utilization=0.4, max_num_seqs=64),
        algorithm=AlgorithmConfig(kl_coef=0.01),
        train=TrainConfig(num_steps=1, prompts_per_step=num_prompts),
    )


def _models() -> Iterator[tuple[str, PlannedModel]]:
    yield "Qwen2.5-VL-3B", load_planned_model("Qwen2.5-VL-3B")
    vila = load_planned_model("LongVILA-7B")
    yield "LongVILA-7B", vila
    assert vila.tower is not None
    implied = round(CLAIMED_TOKENS / NUM_FRAMES)
    patches = vila.tower.patches(1, vila.tower.size_hw(1, 1, 0, 0)) // vila.tower.merge**2
    tower = replace(vila.tower, tokens_after_frame=implied - patches)
    yield f"LongVILA-7B at {implied} tokens a frame", replace(vila, tower=tower)


def _claim(title: str, model: PlannedModel, machine: Machine) -> Claim:
    cfg = recipe(num_prompts=machine.world)
    longer = with_frames(cfg, model, machine.assumed, NUM_FRAMES)
    options = search(longer, model, machine)
    if suggested(options) is None:
        options = search(longer, model, machine, tight_cache=True)
    best = suggested(options)
    return Claim(
        title=title,
        gpus=machine.world,
        tokens_a_frame=options[0].case.work.video_tokens // NUM_FRAMES,
        num_frames=NUM_FRAMES,
        option=best,
        why_not="" if best is not None else what_is_missing(options),
        limit=largest_frames(cfg, model, machine),
    )
