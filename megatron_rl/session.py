# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a run from its configuration and holds them together. The loop composes them; they never meet.

The parts get the few values they need; only this module and the jobs read RunConfig.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.rows.dataset import read_rows
from data.rows.loader import RowLoader
from data.rows.manifest import Manifest
from data.rows.prompts import PromptBuilder
from data.video.frames import FrameSettings
from data.video.index_store import IndexStore
from data.video.open_decoder import open_video_decoder
from data.video.prefetch import FramePrefetcher
from megatron_rl.config.schema import DataConfig, RunConfig
from megatron_rl.media.embedding_store import DiskStore
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.media.no_media import NoMedia
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.metric_log import MetricLog
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.protocols import MediaEncoder, ModelProvider, StepEncoder, VideoDecoder
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import Backend, choose_backend, define_torchvision_operators
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.runtime.signals import StopFlag
from megatron_rl.runtime.watchdog import Watchdog, watch_world
from megatron_rl.training import checkpoint
from megatron_rl.training.policy import Hyperparameters, Policy
from megatron_rl.types import Row, VisionPart
from model_providers.provider import open_provider

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_rl.rollout.vllm_engine import VllmEngine
    from megatron_rl.weight_sync.resharder import Resharder
    from model_providers.transformer import ChunkedStage, LanguageModel
    from model_providers.weight_map import WeightMap


@dataclass(frozen=True, slots=True)
class Session:
    """The parts every job has: data, vision, policy, logs."""

    cfg: RunConfig
    backend: Backend
    mesh: ParallelMesh
    provider: ModelProvider
    tokenizer: PreTrainedTokenizerBase
    builder: PromptBuilder
    vision: StepEncoder
    ahead: PromptPrefetcher
    policy: Policy
    quarantine: Quarantine
    log: MetricLog
    progress: Progress
    stop: StopFlag

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokenizer's and those of generation_config.json."""
        ids = {self.tokenizer.eos_token_id}
        path = Path(self.cfg.model.hf) / "generation_config.json"
        if path.is_file():
            stated = json.loads(path.read_text()).get("eos_token_id", [])
            ids |= {stated} if isinstance(stated, int) else set(stated)
        return tuple(sorted(ids))

    @property
    def checkpoints(self) -> Path:
        return Path(self.cfg.run_dir) / "checkpoints"


@contextmanager
def open_session(cfg: RunConfig, temperature: float) -> Iterator[Session]:
    """Join the world, build the model, fill it with weights; leave the world at the end of the block. Collective.

    `temperature` is that at which the policy scores tokens: the one they are sampled at.

    A rank that dies inside the block stops the others with a message that names it and its phase.
    """
    stop = StopFlag()
    backend = choose_backend(cfg.device, cfg.model.dtype)
    sizes = cfg.parallel
    mesh = parallel.initialize(
        backend,
        sizes.tensor,
        sizes.pipeline,
        sizes.context,
        cfg.rollout.tensor,
        sizes.expert,
        sizes.virtual_pipeline,
        sizes.context_comm,
    )
    with watch_world() as watchdog:
        session = _build_session(cfg, temperature, backend, mesh, watchdog, stop)
        try:
            yield session
        finally:
            session.vision.close()  # else the interpreter would finish decoding before it ends
        session.log.close()
    parallel.shut_down()


def _build_session(
    cfg: RunConfig, temperature: float, backend: Backend, mesh: ParallelMesh, watchdog: Watchdog, stop: StopFlag
) -> Session:
    torch.manual_seed(cfg.seed)
    provider = open_model(cfg)
    tower = open_tower(cfg, backend, provider)
    policy = _build_policy(cfg, temperature, backend, mesh, provider, tower)
    decoder = open_decoder(cfg, backend)
    tokenizer = load_tokenizer(cfg.model.hf)
    builder = open_builder(cfg.data, tokenizer, provider, decoder)
    vision = open_vision(cfg, tower, provider, decoder)
    return Session(
        cfg=cfg,
        backend=backend,
        mesh=mesh,
        provider=provider,
        tokenizer=tokenizer,
        builder=builder,
        vision=vision,
        ahead=PromptPrefetcher(builder, mesh, vision),
        policy=policy,
        quarantine=Quarantine(cfg.run_dir, mesh.rank == 0, cfg.data.max_bad_fraction),
        log=_open_log(cfg, mesh),
        progress=Progress(
            cfg.train.num_steps, enabled=mesh.rank == 0, on_phase=watchdog.set_phase, synchronize=backend.synchronize
        ),
        stop=stop,
    )


def open_model(cfg: RunConfig) -> ModelProvider:
    return open_provider(cfg.model.hf, cfg.data.min_pixels, cfg.data.max_pixels, cfg.data.total_pixels)


def open_decoder(cfg: RunConfig, backend: Backend) -> VideoDecoder:
    indexes = IndexStore(Path(cfg.run_dir) / "index")
    return open_video_decoder(backend.decoder_device, cfg.data.decode_threads, indexes)


def open_builder(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, provider: ModelProvider, decoder: VideoDecoder
) -> PromptBuilder:
    return PromptBuilder(
        tokenizer,
        provider.specs,
        decoder,
        format_prompt=data.format_prompt,
        frames=FrameSettings(data.num_frames, data.fps, data.min_frames, data.max_frames, data.frame_rule),
        max_prompt_tokens=data.max_prompt_tokens,
        manifest=Manifest(data.manifest) if data.manifest else None,
    )


def open_tower(cfg: RunConfig, backend: Backend, provider: ModelProvider) -> MediaEncoder | None:
    """The vision tower of the model, if it has one, with the weights to start from. Collective."""
    parts: tuple[VisionPart, ...] = (
        ("tower", "projector") if cfg.model.train_vision == "all" else (cfg.model.train_vision,)
    )
    trained = frozenset(() if cfg.model.freeze_vision else parts)
    tower = provider.build_encoder(backend, backend.local_device(parallel.local_rank()), trained)
    if cfg.model.weights_from and tower is not None:
        checkpoint.load_tower(cfg.model.weights_from, tower)
    return tower


def open_vision(
    cfg: RunConfig, tower: MediaEncoder | None, provider: ModelProvider, decoder: VideoDecoder
) -> StepEncoder:
    """What encodes the media of a step, and what their embeddings are kept in."""
    if tower is None:
        return NoMedia()
    store = None
    if cfg.data.cache_dir:
        max_bytes = int(cfg.data.cache_gib * 2**30)
        store = DiskStore(cfg.data.cache_dir, max_bytes, tower.fingerprint(), tower.dtype, tower.width)
    sound = provider.specs.sound
    frames = FramePrefetcher(decoder, cfg.data.prefetch_mib << 20, cfg.data.decode_threads, sound)
    return ParallelEncoder(tower, frames, frames_per_chunk=cfg.data.frames_per_chunk, store=store)


def _build_policy(
    cfg: RunConfig,
    temperature: float,
    backend: Backend,
    mesh: ParallelMesh,
    provider: ModelProvider,
    tower: MediaEncoder | None,
) -> Policy:
    model = provider.build_language(backend, mesh, temperature, cfg.model.recompute)
    provider.load_language(model, mesh)
    freeze(model, cfg.model.freeze)
    optimizer = cfg.train.optimizer
    hyper = Hyperparameters(
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.max_grad_norm,
        offload=cfg.train.offload_optimizer,
    )
    policy = Policy(model, backend, mesh, hyper, tower)
    if cfg.model.weights_from:
        checkpoint.load_weights(cfg.model.weights_from, policy)
    return policy


def freeze(model: LanguageModel | ChunkedStage, patterns: Sequence[str]) -> None:
    """Take the parameters whose table name matches a pattern out of training."""
    for name, param in model.named_weights().items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            param.requires_grad_(False)


def frozen_in_engine(weights: WeightMap, patterns: Sequence[str]) -> frozenset[str]:
    """Engine parameters all of whose trainer parameters are frozen: the same on every rank."""
    trained = {e.engine for name, e in weights.entries.items() if not any(fnmatchcase(name, p) for p in patterns)}
    return frozenset(e.engine for e in weights.entries.values()) - trained


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    define_torchvision_operators()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _open_log(cfg: RunConfig, mesh: ParallelMesh) -> MetricLog:
    return MetricLog(cfg.run_dir, mesh.rank == 0, cfg.log.wandb, cfg.log.project, cfg.log.tensorboard, asdict(cfg))


def usable_rows(setting: str, media_root: str, field: str, quarantine: Quarantine) -> list[list[Row]]:
    """Usable rows of each data set that the setting lists; the others are counted and listed."""
    found = read_rows(setting, media_root, quarantine.path.parent / "media", field)
    for rows, bad in found:
        quarantine.add(bad, len(rows) + len(bad), where=f"{field}={setting}")
    return [rows for rows, _ in found]


def open_loader(session: Session) -> RowLoader:
    cfg = session.cfg
    rows = usable_rows(cfg.data.train, cfg.data.media_root, "data.train", session.quarantine)
    return RowLoader(rows, cfg.train.prompts_per_step, cfg.seed, cfg.data.shuffle, cfg.data.weights)


def read_eval_rows(session: Session) -> list[Row]:
    cfg = session.cfg.data
    found = usable_rows(cfg.eval, cfg.media_root, "data.eval", session.quarantine) if cfg.eval else []
    return [row for rows in found for row in rows]


def open_engine(session: Session) -> tuple[VllmEngine, Resharder]:
    """A vLLM replica over this rank's rollout group, and the plan that fills it. Collective."""
    from megatron_rl.rollout.vllm_engine import EngineSettings, VllmEngine
    from megatron_rl.weight_sync.plan import Layouts, make_plan
    from megatron_rl.weight_sync.resharder import Resharder
    from megatron_rl.weight_sync.shape_check import check_fit

    cfg, mesh, provider = session.cfg, session.mesh, session.provider
    settings = EngineSettings(
        model=provider.engine,
        tensor=cfg.rollout.tensor,
        max_model_len=cfg.max_model_len,
        max_num_seqs=cfg.rollout.max_num_seqs,
        kv_cache_bytes=int(cfg.rollout.kv_cache_gib * 2**30),
        gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
        enforce_eager=cfg.rollout.enforce_eager,
    )
    engine = VllmEngine(
        settings,
        session.backend,
        provider.forbidden_tokens,
        session.eos_token_ids,
        provider.position_ids,
        lambda ids: session.tokenizer.decode(ids, skip_special_tokens=True),
    )
    layouts = Layouts(
        mesh.world,
        mesh.tensor,
        mesh.pipeline,
        mesh.context,
        mesh.rollout_tensor,
        virtual=mesh.virtual,
        expert=mesh.expert,
    )
    plan = make_plan(provider.weight_map, provider.shape.num_layers, layouts)
    source = {name: param.data for name, param in session.policy.language_model.named_weights().items()}
    target = engine.parameters()
    check_fit(
        provider.weight_map,
        mesh.here.tp,
        mesh.tensor,
        mesh.rollout_tp_rank,
        mesh.rollout_tensor,
        source,
        target,
        mesh.slot(is_expert=True),
    )
    frozen = frozen_in_engine(provider.weight_map, cfg.model.freeze)
    return engine, Resharder(plan, mesh.rank, source, target, cfg.rollout.sync_buffer_mib * 2**20, frozen)
