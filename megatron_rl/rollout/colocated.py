# SPDX-License-Identifier: Apache-2.0
"""Rollouts by an engine on the trainer's own devices: it wakes up, takes the newest weights, samples, and sleeps while
the trainer learns. Everything here is collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from data.rows.loader import RowLoader
from megatron_rl.algorithms.groups import keep_informative
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.protocols import Learner, RewardFunction, RolloutEngine, StepEncoder, WeightSync
from megatron_rl.rollout.generate import generate
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.types import Group, Prompt, RolloutBatch, Sampling, SyncReport


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Which groups are worth learning from (DAPO's dynamic sampling): those whose mean reward is inside (low, high).
    `max_rounds`: rollout rounds spent on filling a batch with them."""

    low: float
    high: float
    max_rounds: int


class ColocatedEngine:
    """An engine, what fills it with the learner's weights, and what scores its responses."""

    def __init__(
        self,
        engine: RolloutEngine,
        weight_sync: WeightSync,
        reward: RewardFunction,
        learner: Learner,
        mesh: ParallelMesh,
        progress: Progress,
        synchronize: Callable[[], None] = lambda: None,
        verify_sync: bool = False,
    ):
        self._engine, self._weight_sync, self._reward, self._learner = engine, weight_sync, reward, learner
        self._mesh, self._progress, self._synchronize, self._verify = mesh, progress, synchronize, verify_sync

    @contextmanager
    def awake(self, step: int) -> Iterator[SyncReport | None]:
        """The engine holds the learner's weights inside the block, whose gradients and optimizer state are offloaded.

        It sleeps again and they are back whatever happens in the block.
        """
        with self._learner.offloaded():
            try:
                with self._progress.phase(step, "sync"):
                    self._engine.wake("weights")
                    report = self._sync_weights()
                    self._engine.wake("kv_cache")
                yield report
            finally:
                self._engine.sleep()

    def _sync_weights(self) -> SyncReport | None:
        """Bring the engine to the learner's version; None when it is there already."""
        version = self._learner.version
        if self._engine.version == version:
            return None
        start = time.perf_counter()
        self._engine.begin_update()
        report = self._weight_sync.sync(version, verify=self._verify)
        self._engine.weights_changed(version)
        self._synchronize()
        return replace(report, seconds=time.perf_counter() - start)

    def sample(self, prompts: Sequence[Prompt], encoder: StepEncoder, sampling: Sampling) -> list[Group]:
        """Responses of the learner's weights, scored; the media of the prompts are encoded already."""
        sampling = replace(sampling, weights_version=self._learner.version)
        return generate(prompts, encoder, self._engine, self._reward, sampling, self._mesh)

    def close(self) -> None:
        self._engine.close()


class ColocatedRollouts:
    """Samples the groups of each step from the rows of a loader (protocol GroupSource). `store` keeps what was sampled,
    if there is one; `group_filter` None: all groups are learned from."""

    def __init__(
        self,
        colocated: ColocatedEngine,
        prompts: PromptPrefetcher,
        encoder: StepEncoder,
        loader: RowLoader,
        sampling: Sampling,
        progress: Progress,
        num_steps: int,
        group_filter: GroupFilter | None = None,
        store: RolloutStore | None = None,
    ):
        self._colocated, self._prompts, self._encoder, self._loader = colocated, prompts, encoder, loader
        self._sampling, self._progress, self._num_steps = sampling, progress, num_steps
        self._filter, self._store = group_filter, store

    def next_batch(self, step: int) -> RolloutBatch:
        self._encoder.forget()
        with self._colocated.awake(step) as report:
            rounds = self._rounds(step)
            batch = _all_of(next(rounds)) if self._filter is None else self._fill(rounds, self._filter)
        if self._store is not None:
            self._store.save(step, batch.kept)
        return replace(batch, sync=report)

    def _rounds(self, step: int) -> Iterator[list[Group]]:
        """The groups of the next rows, round after round."""
        is_last_step = step + 1 == self._num_steps
        while True:
            with self._progress.phase(step, "encode"):
                prompts = self._prompts.encoded(self._loader.next_batch(), f"step {step}")
                if not is_last_step or self._filter is not None:
                    self._prompts.prepare(self._loader.peek_batch())  # read while the engine generates
            with self._progress.phase(step, "gen"):
                groups = self._colocated.sample(prompts, self._encoder, replace(self._sampling, step=step))
            yield groups

    def _fill(self, rounds: Iterator[list[Group]], wanted: GroupFilter) -> RolloutBatch:
        """As many rounds as it takes for a batch of informative groups."""
        sampled: list[Group] = []
        kept: list[Group] = []
        for _ in range(wanted.max_rounds):
            groups = next(rounds)
            sampled += groups
            kept += keep_informative(groups, wanted.low, wanted.high)[0]
            if len(kept) >= self._loader.batch_size:
                return RolloutBatch(tuple(sampled), tuple(kept[: self._loader.batch_size]))
        raise ValueError(
            f"algorithm.max_filter_rounds={wanted.max_rounds}: only {len(kept)} of {self._loader.batch_size} groups "
            "were informative; raise it, or change the data or the reward"
        )


def _all_of(groups: Sequence[Group]) -> RolloutBatch:
    return RolloutBatch(tuple(groups), tuple(groups))
