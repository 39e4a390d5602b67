# SPDX-License-Identifier: Apache-2.0
"""Prompts -> completions -> scores, with the work split over replicas and the results sent to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_rl.protocols import RewardFunction, RolloutEngine, StepEncoder
from megatron_rl.runtime.parallel import ParallelMesh, gather_lists
from megatron_rl.types import Completion, Group, Prompt, Sampling, Scored


def generate(
    prompts: Sequence[Prompt],
    encoder: StepEncoder,
    engine: RolloutEngine,
    reward: RewardFunction,
    sampling: Sampling,
    mesh: ParallelMesh,
) -> list[Group]:
    """Sample and score: replica d takes prompts d, d + D, ...; all ranks get all groups, in prompt order.
    Collective."""
    mine = list(prompts[mesh.replica :: mesh.num_replicas])
    embeds = encoder.fetch([item for prompt in mine for item in prompt.media])
    completions = engine.generate(mine, embeds, sampling)
    scored: list[Scored] = []
    if mesh.speaks_for_replica and completions:  # a reward need not know what to make of none
        by_id = {prompt.prompt_id: prompt for prompt in mine}
        parts = reward([by_id[c.prompt_id] for c in completions], completions)
        scored = [_scored(c, part) for c, part in zip(completions, parts, strict=True)]
    by_prompt: dict[int, list[Scored]] = {}
    for item in gather_lists(scored):
        by_prompt.setdefault(item.completion.prompt_id, []).append(item)
    return [Group(prompt, tuple(by_prompt[prompt.prompt_id])) for prompt in prompts]


def _scored(completion: Completion, parts: Mapping[str, float | str]) -> Scored:
    """Numbers are parts of the reward, texts are notes."""
    values = {name: part for name, part in parts.items() if not isinstance(part, str)}
    notes = {name: part for name, part in parts.items() if isinstance(part, str)}
    return Scored(completion, values["overall"], values, notes)
