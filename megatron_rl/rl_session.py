# SPDX-License-Identifier: Apache-2.0
"""Builds what only reinforcement learning has, from its configuration: engine, rollouts, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from data.rows.loader import RowLoader
from megatron_rl.config.schema import RlConfig
from megatron_rl.evaluate import Evaluation, EvaluationPlan
from megatron_rl.protocols import GroupSource, RewardFunction
from megatron_rl.reading.inputs import usable_rows
from megatron_rl.rollout.colocated import ColocatedEngine, ColocatedRollouts, GroupFilter
from megatron_rl.rollout.kv_cache import cache_bytes, kv_bytes
from megatron_rl.rollout.replayed import ReplayedRollouts
from megatron_rl.rollout.store import RolloutStore
from megatron_rl.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_rl.runtime.device import host_memory
from megatron_rl.runtime.parallel import local_world_size
from megatron_rl.session import Session
from megatron_rl.training.token_learner import TokenLearner
from megatron_rl.types import Sampling
from megatron_rl.weight_sync.plan import build_plan
from megatron_rl.weight_sync.resharder import Resharder
from megatron_rl.weight_sync.shape_check import check_fit
from model_providers.weight_map import WeightMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def open_colocated(
    cfg: RlConfig, session: Session, learner: TokenLearner, reward: RewardFunction
) -> Iterator[ColocatedEngine]:
    """The engine on the trainer's ranks; freed at the end of the block. Collective."""
    with learner.offloaded():  # the engine measures what memory is left for it
        engine, resharder = build_engine(cfg, session)
    colocated = ColocatedEngine(
        engine,
        resharder,
        reward,
        learner,
        session.mesh,
        session.run_state.progress,
        session.backend.synchronize,
        cfg.rollout.verify_sync,
    )
    with closing(colocated):
        yield colocated


def build_source(
    cfg: RlConfig, session: Session, colocated: ColocatedEngine | None, loader: RowLoader | None
) -> GroupSource:
    """Where the groups of a step come from: the engine or, without one, the files of an earlier run."""
    folder, progress = cfg.rollout.replay_from or cfg.rollout.save_to, session.run_state.progress
    store = RolloutStore(folder, writes=session.mesh.rank == 0) if folder else None
    if colocated is None or loader is None:
        assert store is not None, "checked with the recipe: rollout.replay_from"
        return ReplayedRollouts(store, session.prompts, session.encoder, progress)
    algorithm = cfg.algorithm
    wanted = GroupFilter(algorithm.filter_low, algorithm.filter_high, algorithm.max_filter_rounds)
    return ColocatedRollouts(
        colocated,
        session.prompts,
        session.encoder,
        loader,
        _sampling(cfg, cfg.rollout.num_samples, cfg.rollout.temperature, greedy=False),
        progress,
        cfg.train.num_steps,
        wanted if algorithm.filter_groups else None,
        store,
    )


def _sampling(cfg: RlConfig, num_samples: int, temperature: float, greedy: bool) -> Sampling:
    return Sampling(num_samples, temperature, cfg.rollout.max_response_tokens, cfg.seed, greedy=greedy)


def build_evaluation(cfg: RlConfig, session: Session, colocated: ColocatedEngine | None) -> Evaluation:
    settings, data = cfg.eval, cfg.data
    found = usable_rows(data, "data.eval", session.quarantine)
    plan = EvaluationPlan(
        every=settings.every,
        at_start=settings.at_start,
        at_end=settings.at_end,
        blind=settings.blind,
        batch_size=settings.batch_size,
        num_steps=cfg.train.num_steps,
    )
    return Evaluation(
        colocated,
        session.prompts,
        session.encoder,
        [row for rows in found for row in rows],
        data.eval,
        _sampling(cfg, num_samples=1, temperature=1.0, greedy=True),
        plan,
        RolloutStore(Path(cfg.run_dir) / "eval", writes=session.mesh.rank == 0),
        session.run_state.progress,
    )


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, folder: str) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's and those of generation_config.json."""
    ids = {tokenizer.eos_token_id}
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        stated = json.loads(path.read_text()).get("eos_token_id", [])
        ids |= {stated} if isinstance(stated, int) else set(stated)
    return tuple(sorted(ids))


def build_engine(cfg: RlConfig, session: Session) -> tuple[VllmEngine, Resharder]:
    """A vLLM replica over this rank's rollout group, and the plan that fills it. Collective."""

    mesh, provider = session.mesh, session.provider
    settings = EngineSettings(
        model=provider.engine,
        tensor=cfg.rollout.tensor,
        max_model_len=cfg.max_model_len,
        max_num_seqs=cfg.rollout.max_num_seqs,
        kv_cache_bytes=int(cfg.rollout.kv_cache_gib * 2**30) or _derived_cache_bytes(cfg, session),
        gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
        enforce_eager=cfg.rollout.enforce_eager,
    )
    engine = VllmEngine(
        settings,
        session.backend,
        provider.forbidden_tokens,
        eos_token_ids(session.tokenizer, cfg.model.hf),
        provider.position_ids,
        lambda ids: str(session.tokenizer.decode(list(ids), skip_special_tokens=True)),
    )
    plan = build_plan(provider.weight_map, provider.shape.num_layers, mesh.trainer, mesh.engine)
    source = {name: param.data for name, param in session.policy.language_model.named_weights().items()}
    target = engine.parameters()
    check_fit(provider.weight_map, mesh.trainer, mesh.engine, mesh.rank, source, target)
    frozen = frozen_in_engine(provider.weight_map, cfg.model.freeze)
    return engine, Resharder(plan, mesh.rank, source, target, cfg.rollout.sync_buffer_mib * 2**20, frozen)


def _derived_cache_bytes(cfg: RlConfig, session: Session) -> int:
    """0 where vLLM measures what is free."""
    backend, rollout = session.backend, cfg.rollout
    if backend.measures_kv_cache:
        return 0
    assert backend.kv_block_size is not None
    share = int(rollout.gpu_memory_utilization * host_memory() / local_world_size())
    per_token = kv_bytes(session.provider.shape, rollout.tensor, backend.dtype.itemsize)
    return cache_bytes(per_token, cfg.max_model_len, rollout.max_num_seqs, backend.kv_block_size, share)


def frozen_in_engine(weights: WeightMap, patterns: Sequence[str]) -> frozenset[str]:
    """Engine parameters all of whose trainer parameters are frozen: the same on every rank."""
    trained = {e.engine for name, e in weights.entries.items() if not any(fnmatchcase(name, p) for p in patterns)}
    return frozenset(e.engine for e in weights.entries.values()) - trained
