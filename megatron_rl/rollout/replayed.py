# SPDX-License-Identifier: Apache-2.0
"""Rollouts of an earlier run, read from its files: no engine is built. The media must still be the same files."""

from __future__ import annotations

from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.protocols import StepEncoder
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.types import RolloutBatch


class ReplayedRollouts:
    """The saved groups of each step (protocol GroupSource). Collective."""

    def __init__(self, store: RolloutStore, prompts: PromptPrefetcher, encoder: StepEncoder, progress: Progress):
        self._store, self._prompts, self._encoder, self._progress = store, prompts, encoder, progress

    def next_batch(self, step: int) -> RolloutBatch:
        self._encoder.forget()
        groups = self._store.load(step)
        self._store.check_learnable(step, groups)
        with self._progress.phase(step, "encode"):
            pairs = [(group.prompt.prompt_id, group.prompt.row) for group in groups]
            prompts = self._prompts.encoded(pairs, f"replayed step {step}")
        self._store.check_unchanged(groups, prompts)
        return RolloutBatch(tuple(groups), tuple(groups))
