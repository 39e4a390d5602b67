# SPDX-License-Identifier: Apache-2.0
"""Rows -> prompts -> completions -> scores, with the work spread over ranks and the results known to all."""

from __future__ import annotations

from collections.abc import Sequence

from data.prompts import PromptBuilder
from megatron_rl.errors import BadSample
from megatron_rl.parallel import ParallelMesh, gather_lists
from megatron_rl.protocols import RewardFunction, RolloutEngine
from megatron_rl.rollout.vision_cache import VisionCache
from megatron_rl.types import BadRow, Group, Prompt, Row, Sampling, Scored


def build_prompts(
    pairs: Sequence[tuple[int, Row]], builder: PromptBuilder, mesh: ParallelMesh
) -> tuple[list[Prompt], list[BadRow]]:
    """Every rank probes and tokenizes its share; all get all, in the order of `pairs`. Collective."""
    mine: list[tuple[int, Prompt | BadRow]] = []
    for index in range(mesh.rank, len(pairs), mesh.world):
        prompt_id, row = pairs[index]
        try:
            mine.append((index, builder.build(prompt_id, row)))
        except BadSample as error:
            mine.append((index, BadRow(row.source, f"{error.source}: {error.reason}", error.kind)))
    built = [item for _, item in sorted(gather_lists(mine), key=lambda pair: pair[0])]
    return [p for p in built if isinstance(p, Prompt)], [b for b in built if isinstance(b, BadRow)]


def encode_videos(prompts: Sequence[Prompt], vision: VisionCache) -> tuple[list[Prompt], list[BadRow]]:
    """Encode every video of the batch; prompts whose video turned out faulty come back as bad rows. Collective."""
    failed = vision.encode([video for prompt in prompts for video in prompt.videos])
    good, bad = [], []
    for prompt in prompts:
        reasons = [f"{video.path}: {failed[video.key]}" for video in prompt.videos if video.key in failed]
        if reasons:
            bad.append(BadRow(prompt.row.source, "; ".join(reasons), "media"))
        else:
            good.append(prompt)
    return good, bad


def generate(
    prompts: Sequence[Prompt],
    vision: VisionCache,
    engine: RolloutEngine,
    reward: RewardFunction,
    sampling: Sampling,
    mesh: ParallelMesh,
) -> list[Group]:
    """Sample and score: replica d takes prompts d, d + D, ...; all ranks get all groups, in prompt order.
    Collective."""
    mine = list(prompts[mesh.replica :: mesh.num_replicas])
    embeds = vision.fetch([video for prompt in mine for video in prompt.videos])
    completions = engine.generate(mine, embeds, sampling)
    scored: list[Scored] = []
    if mesh.speaks_for_replica:
        by_id = {prompt.prompt_id: prompt for prompt in mine}
        parts = reward([by_id[c.prompt_id] for c in completions], completions)
        scored = [Scored(c, part["overall"], part) for c, part in zip(completions, parts, strict=True)]
    by_prompt: dict[int, list[Scored]] = {}
    for item in gather_lists(scored):
        by_prompt.setdefault(item.completion.prompt_id, []).append(item)
    return [Group(prompt, tuple(by_prompt[prompt.prompt_id])) for prompt in prompts]
