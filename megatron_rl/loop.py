# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning, a step on one page: sample a group of responses per prompt, score them, learn from them.

GRPO (arXiv 2402.03300) with a global token normaliser, DAPO's clip-higher and dynamic sampling (arXiv 2503.14476), and
an optional KL term to a frozen reference. Every function here is collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from data.rows.loader import RowLoader
from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.algorithms.groups import keep_informative
from megatron_rl.media.prompt_prefetcher import encode_videos
from megatron_rl.observe.step_metrics import MismatchMetric, Totals, rollout_metrics, sync_metrics, vision_metrics
from megatron_rl.protocols import PolicyLoss, RewardFunction, RolloutEngine
from megatron_rl.rollout.generate import generate
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.session import Session
from megatron_rl.training.batch import make_samples, pack
from megatron_rl.training.microbatch import MicroBatch, localize
from megatron_rl.training.policy import Reference, ScoredBatch
from megatron_rl.types import Group, MediaEmbeds, Prompt, Row, Sampling, SyncReport
from megatron_rl.weight_sync.resharder import Resharder


@dataclass(frozen=True, slots=True)
class Rollout:
    """What generates: the engine, what fills it with weights, what scores its responses."""

    engine: RolloutEngine
    resharder: Resharder
    reward: RewardFunction


def rl_step(
    session: Session,
    rollout: Rollout,
    loader: RowLoader,
    loss: PolicyLoss,
    reference: Reference | None,
    store: RolloutStore | None,
    step: int,
) -> dict[str, float]:
    """One step of the main job: sync, sample, score, learn. Returns its metrics."""
    session.vision.forget()
    with rollout_phase(session, rollout, step) as report:
        sampled, groups = collect_groups(session, rollout, loader, step)
    metrics = rollout_metrics(sampled, groups, session.quarantine.metrics()) | sync_metrics(report)
    if store is not None:
        store.save(step, groups)
    if not session.cfg.rollout.only:
        metrics |= train_on(session, groups, loss, reference, step)
    return metrics | vision_metrics(session.vision.take_counts())


def replay_step(
    session: Session, loss: PolicyLoss, reference: Reference | None, store: RolloutStore, step: int
) -> dict[str, float]:
    """A step on rollouts that were saved before; the videos must still be the same files."""
    session.vision.forget()
    groups = store.load(step)
    with session.progress.phase(step, "encode"):
        pairs = [(g.prompt.prompt_id, g.prompt.row) for g in groups]
        prompts = usable_prompts(session, pairs, f"replayed step {step}")
    store.check_unchanged(groups, prompts)
    metrics = rollout_metrics(groups, groups, session.quarantine.metrics())
    metrics |= train_on(session, groups, loss, reference, step)
    return metrics | vision_metrics(session.vision.take_counts())


@contextmanager
def rollout_phase(session: Session, rollout: Rollout, step: int) -> Iterator[SyncReport | None]:
    """The engine awake and filled with the policy's weights; the trainer's gradients and optimizer state offloaded."""
    with session.policy.offloaded():
        with session.progress.phase(step, "sync"):
            rollout.engine.wake("weights")
            report = sync_weights(session, rollout)
            rollout.engine.wake("kv_cache")
        yield report
        rollout.engine.sleep()


def sync_weights(session: Session, rollout: Rollout) -> SyncReport | None:
    """Bring the engine to the policy's version; None when it is there already."""
    version, engine = session.policy.version, rollout.engine
    if engine.version == version:
        return None
    start = time.perf_counter()
    engine.begin_update()
    report = rollout.resharder.sync(version, verify=session.cfg.rollout.verify_sync)
    engine.weights_changed(version)
    session.backend.synchronize()
    return replace(report, seconds=time.perf_counter() - start)


def usable_prompts(session: Session, pairs: Sequence[tuple[int, Row]], where: str) -> list[Prompt]:
    """Prompts whose videos are encoded; what cannot be used is set aside and counted."""
    prompts, bad_rows = session.ahead.take(pairs)
    prompts, bad_videos = encode_videos(prompts, session.vision)
    session.quarantine.add([*bad_rows, *bad_videos], len(pairs), where)
    return prompts


def collect_groups(session: Session, rollout: Rollout, loader: RowLoader, step: int) -> tuple[list[Group], list[Group]]:
    """(all sampled groups, those to learn from): one round, or with `filter_groups` as many as it takes."""
    cfg, algorithm = session.cfg.rollout, session.cfg.algorithm
    sampling = Sampling(
        num_samples=cfg.num_samples,
        temperature=cfg.temperature,
        max_response_tokens=cfg.max_response_tokens,
        seed=session.cfg.seed,
        step=step,
        weights_version=session.policy.version,
    )
    wanted = session.cfg.train.prompts_per_step
    sampled: list[Group] = []
    kept: list[Group] = []
    for _ in range(algorithm.max_filter_rounds):
        with session.progress.phase(step, "encode"):
            prompts = usable_prompts(session, loader.next_batch(), f"step {step}")
            if step + 1 < session.cfg.train.num_steps or algorithm.filter_groups:
                session.ahead.prepare(loader.peek_batch())  # decoded while the engine generates
        with session.progress.phase(step, "gen"):
            groups = generate(prompts, session.vision, rollout.engine, rollout.reward, sampling, session.mesh)
        if not algorithm.filter_groups:
            return groups, groups
        sampled += groups
        kept += keep_informative(groups, algorithm.filter_low, algorithm.filter_high)[0]
        if len(kept) >= wanted:
            return sampled, kept[:wanted]
    raise ValueError(
        f"algorithm.max_filter_rounds={algorithm.max_filter_rounds}: only {len(kept)} of {wanted} groups were "
        "informative; raise it, or change the data or the reward"
    )


def fetch_embeds(
    session: Session, updates: Sequence[Sequence[MicroBatch]]
) -> tuple[list[list[MicroBatch]], list[MediaEmbeds]]:
    """The updates, and for each the embeddings of those video tokens that this rank puts into its micro-batches.

    The last that is asked of the step's embeddings: those that other ranks use are dropped."""
    local = [localize(batches) for batches in updates]
    asks = session.mesh.is_first_stage
    embeds = [session.vision.fetch_tokens(w if asks else {}) for _, w in local]
    session.vision.release()
    return [batches for batches, _ in local], embeds


def train_on(
    session: Session, groups: Sequence[Group], loss: PolicyLoss, reference: Reference | None, step: int
) -> dict[str, float]:
    """Learn from one rollout batch: `updates_per_step` optimizer updates. Returns the metrics of all ranks together."""
    cfg, policy, progress = session.cfg, session.policy, session.progress
    samples = make_samples(groups, ADVANTAGES[cfg.algorithm.advantage], cfg.rollout.truncated)
    updates = pack(
        samples,
        cfg.train.updates_per_step,
        cfg.train.max_tokens_per_microbatch,
        session.provider,
        session.mesh,
        cfg.algorithm.loss_average,
        cfg.train.share_prefix,
    )
    updates, embeds = fetch_embeds(session, updates)
    old = [[None] * len(batches) for batches in updates]
    if len(updates) > 1:  # a single update starts at the weights that sampled: its own log-probabilities are the old
        with progress.phase(step, "old"):
            old = [policy.logprobs(batches, made.tables) for batches, made in zip(updates, embeds, strict=True)]
    ref = [[None] * len(batches) for batches in updates]
    if reference is not None:
        with progress.phase(step, "ref"), reference.swapped_in():
            seen = (session.vision.refreshed(made).tables for made in embeds)
            ref = [policy.logprobs(batches, tables) for batches, tables in zip(updates, seen, strict=True)]
    totals, watched = Totals(), MismatchMetric(loss)
    with progress.phase(step, "update_actor"):
        for batches, made, old_logprobs, ref_logprobs in zip(updates, embeds, old, ref, strict=True):
            scored = [ScoredBatch(*parts) for parts in zip(batches, old_logprobs, ref_logprobs, strict=True)]
            now = session.vision.refreshed(made)
            totals.add(policy.train(scored, now.tables, watched, step, partial(session.vision.backward, now)))
    skipped = {"actor/skipped_updates": float(cfg.train.updates_per_step - len(updates))}
    return totals.reduced() | watched.metrics() | skipped
