# SPDX-License-Identifier: Apache-2.0
"""The next batch, made ready while the engine generates with this one: prompts built, their frames being decoded."""

from __future__ import annotations

from collections.abc import Sequence

from data.prompts import PromptBuilder
from megatron_rl.parallel import ParallelMesh
from megatron_rl.rollout.phase import build_prompts
from megatron_rl.rollout.vision_cache import VisionCache
from megatron_rl.types import BadRow, Prompt, Row

Pairs = Sequence[tuple[int, Row]]
Built = tuple[list[Prompt], list[BadRow]]


class Lookahead:
    """Holds at most one batch. Every method is collective."""

    def __init__(self, builder: PromptBuilder, mesh: ParallelMesh, vision: VisionCache):
        self._builder, self._mesh, self._vision = builder, mesh, vision
        self._pairs: list[tuple[int, Row]] = []
        self._built: Built = ([], [])

    def prepare(self, pairs: Pairs) -> None:
        """Build the prompts of a batch to come and begin to decode this rank's share of its frames."""
        self._pairs, self._built = list(pairs), build_prompts(pairs, self._builder, self._mesh)
        self._vision.prefetch([video for prompt in self._built[0] for video in prompt.videos])

    def take(self, pairs: Pairs) -> Built:
        """The prompts of a batch, prepared or not."""
        if self._pairs != list(pairs):
            return build_prompts(pairs, self._builder, self._mesh)
        self._pairs = []
        return self._built
