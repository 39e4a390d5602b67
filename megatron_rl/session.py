# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a job from its configuration. The parts get the few values they need and never see all of it.

`open_session` joins the world and builds what every job has; the other `open_` functions build what a job needs
besides. What only reinforcement learning has is in rl_session.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from checkpoint_tools.origin import origin_of
from data.rows.loader import RowLoader
from data.video.frame_files import FrameFilesDecoder
from data.video.index_store import IndexStore
from data.video.open_decoder import build_video_decoder
from data.video.prefetch import FramePrefetcher
from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.algorithms.correction import CORRECTIONS, CorrectedLoss
from megatron_rl.algorithms.losses import LOSSES
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CacheConfig,
    JobConfig,
    RlConfig,
    SftConfig,
    TrainConfig,
)
from megatron_rl.config.sizes import trainer_grid
from megatron_rl.media.embedding_store import DiskStore
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.media.no_media import NoMedia
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.metric_log import MetricLog
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.protocols import MediaEncoder, ModelProvider, PolicyLoss, StepEncoder, VideoDecoder
from megatron_rl.reading.inputs import (
    build_answer_encoder,
    build_prompt_builder,
    load_tokenizer,
    repeat_note,
    usable_rows,
)
from megatron_rl.run_state import RunState, SavePlan
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import Backend, choose_backend
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.runtime.signals import StopFlag
from megatron_rl.runtime.watchdog import watch_world
from megatron_rl.training import checkpoint
from megatron_rl.training.answers import AnswerSource
from megatron_rl.training.policy import Hyperparameters, Policy, Reference
from megatron_rl.training.token_learner import Objective, PackingSettings, TokenLearner
from megatron_rl.types import VisionPart
from model_providers.provider import open_provider

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_providers.transformer import ChunkedStage, LanguageModel


@dataclass(frozen=True, slots=True)
class Session:
    """What every job has: its place in the world, the model, the data on its way into it, and the records of the run.
    Only the modules that build parts and the jobs hold one."""

    backend: Backend
    mesh: ParallelMesh
    provider: ModelProvider
    tokenizer: PreTrainedTokenizerBase
    encoder: StepEncoder
    prompts: PromptPrefetcher
    policy: Policy
    quarantine: Quarantine
    run_state: RunState


@contextmanager
def open_session(cfg: JobConfig, temperature: float) -> Iterator[Session]:
    """Join the world, build the model, fill it with weights; leave the world at the end of the block. Collective.

    `temperature` is that at which the policy scores tokens: the one they are sampled at. Whatever happens in the block,
    the logs are closed. A rank that dies inside it stops the others with a message that names it and its phase.
    """
    backend = choose_backend(cfg.device, cfg.model.dtype)
    world = parallel.world_size()
    trainer = trainer_grid(cfg.parallel, world)
    engine = Grid(world, tensor=cfg.rollout.tensor if isinstance(cfg, RlConfig) else 1)
    parallel.join_world(backend)
    with watch_world(60 * cfg.max_phase_minutes) as watchdog, ExitStack() as stack:
        stop = StopFlag()  # not before: without a watchdog, a signal must end the survivors of a rank that died
        progress = Progress(
            cfg.train.num_steps, dist.get_rank() == 0, on_phase=watchdog.set_phase, synchronize=backend.synchronize
        )
        with progress.starting("groups"):
            mesh = parallel.initialize(backend, trainer, engine, cfg.parallel.context_comm)
        with progress.starting("model"):
            session = _build_session(cfg, temperature, backend, mesh, progress, stop, stack)
        yield session
    parallel.shut_down()


def _build_session(
    cfg: JobConfig,
    temperature: float,
    backend: Backend,
    mesh: ParallelMesh,
    progress: Progress,
    stop: StopFlag,
    stack: ExitStack,
) -> Session:
    """What must be closed at the end goes onto `stack`."""
    torch.manual_seed(cfg.seed)
    provider = build_provider(cfg)
    media_encoder = build_media_encoder(cfg, backend, provider)
    policy = _build_policy(cfg, temperature, backend, mesh, provider, media_encoder)
    decoder = build_decoder(cfg, backend)
    tokenizer = load_tokenizer(cfg.model.hf)
    builder = build_prompt_builder(cfg.data, tokenizer, provider.specs, decoder)
    # Closed, or the interpreter would finish decoding before it ends.
    encoder = stack.enter_context(closing(build_step_encoder(cfg, media_encoder, provider, decoder)))
    quarantine = Quarantine(cfg.run_dir, mesh.rank == 0, cfg.data.max_bad_fraction)
    log = stack.enter_context(closing(_open_log(cfg, mesh)))
    plan = SavePlan(
        every=cfg.checkpoint.every,
        at_end=cfg.checkpoint.save_at_end,
        best_metric=cfg.checkpoint.best_metric,
        keep=cfg.checkpoint.keep,
        resume=cfg.checkpoint.resume,
    )
    return Session(
        backend=backend,
        mesh=mesh,
        provider=provider,
        tokenizer=tokenizer,
        encoder=encoder,
        prompts=PromptPrefetcher(builder, mesh, encoder, quarantine),
        policy=policy,
        quarantine=quarantine,
        run_state=RunState(
            Path(cfg.run_dir),
            cfg.train.num_steps,
            cfg.model.hf,
            _origin(cfg, mesh),
            policy,
            mesh,
            plan,
            log,
            progress,
            stop,
        ),
    )


def build_provider(cfg: CacheConfig) -> ModelProvider:
    return open_provider(cfg.model.hf, cfg.data.min_pixels, cfg.data.max_pixels, cfg.data.total_pixels)


def build_decoder(cfg: CacheConfig, backend: Backend) -> VideoDecoder:
    indexes = IndexStore(Path(cfg.run_dir) / "index")
    return FrameFilesDecoder(build_video_decoder(backend.decoder_device, cfg.data.decode_threads, indexes))


def build_media_encoder(cfg: CacheConfig, backend: Backend, provider: ModelProvider) -> MediaEncoder | None:
    """The vision tower of the model, if it has one, with the weights to start from. Collective."""
    parts: tuple[VisionPart, ...] = (
        ("tower", "projector") if cfg.model.train_vision == "all" else (cfg.model.train_vision,)
    )
    trained = frozenset(() if cfg.model.freeze_vision else parts)
    media_encoder = provider.build_encoder(backend, backend.local_device(parallel.local_rank()), trained)
    if cfg.model.weights_from:
        checkpoint.check_weights(cfg.model.weights_from)
    if cfg.model.weights_from and media_encoder is not None:
        checkpoint.load_encoder(cfg.model.weights_from, media_encoder)
    return media_encoder


def build_step_encoder(
    cfg: CacheConfig, media_encoder: MediaEncoder | None, provider: ModelProvider, decoder: VideoDecoder
) -> StepEncoder:
    """What encodes the media of a step, and what their embeddings are kept in."""
    if media_encoder is None:
        return NoMedia()
    store = None
    if cfg.data.cache_dir:
        max_bytes = int(cfg.data.cache_gib * 2**30)
        store = DiskStore(
            cfg.data.cache_dir, max_bytes, media_encoder.fingerprint(), media_encoder.dtype, media_encoder.width
        )
    sound = provider.specs.sound
    frames = FramePrefetcher(decoder, cfg.data.prefetch_mib << 20, cfg.data.decode_threads, sound)
    return ParallelEncoder(media_encoder, frames, frames_per_chunk=cfg.data.frames_per_chunk, store=store)


def _build_policy(
    cfg: JobConfig,
    temperature: float,
    backend: Backend,
    mesh: ParallelMesh,
    provider: ModelProvider,
    media_encoder: MediaEncoder | None,
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
    policy = Policy(model, backend, mesh, hyper, media_encoder)
    if cfg.model.weights_from:
        checkpoint.load_weights(cfg.model.weights_from, policy)
    return policy


def _origin(cfg: JobConfig, mesh: ParallelMesh) -> dict[str, str]:
    """What this run begins with; on rank 0."""
    if mesh.rank != 0:
        return {}
    start = checkpoint.find_start(cfg.model.weights_from) if cfg.model.weights_from else None
    return origin_of(Path(cfg.model.hf), start)


def freeze(model: LanguageModel | ChunkedStage, patterns: Sequence[str]) -> None:
    """Take the parameters whose table name matches a pattern out of training."""
    for name, param in model.named_weights().items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            param.requires_grad_(False)


def _open_log(cfg: JobConfig, mesh: ParallelMesh) -> MetricLog:
    return MetricLog(cfg.run_dir, mesh.rank == 0, cfg.log.wandb, cfg.log.project, cfg.log.tensorboard, asdict(cfg))


def build_loader(cfg: JobConfig, quarantine: Quarantine) -> RowLoader:
    rows = usable_rows(cfg.data, "data.train", quarantine)
    if note := repeat_note(rows, cfg.train.prompts_per_step):
        quarantine.note(note)
    return RowLoader(rows, cfg.train.prompts_per_step, cfg.seed, cfg.data.shuffle, cfg.data.weights)


# ------------------------------------------------------------------------------------------------------------ learning


def build_learner(cfg: RlConfig, session: Session) -> TokenLearner:
    """Before a resume: the reference is the weights that the run starts from."""
    algorithm = cfg.algorithm
    reference = Reference(session.policy) if algorithm.kl_coef else None
    objective = Objective(ADVANTAGES[algorithm.advantage], build_loss(algorithm), cfg.rollout.truncated)
    return _token_learner(session, _packing(cfg.train, algorithm.loss_average), reference, objective)


def build_answer_learner(cfg: SftConfig, session: Session) -> TokenLearner:
    """A learner for `learn_answers` alone."""
    return _token_learner(session, _packing(cfg.train, cfg.train.loss_average), reference=None, objective=None)


def _packing(train: TrainConfig, loss_average: str) -> PackingSettings:
    return PackingSettings(train.updates_per_step, train.max_tokens_per_microbatch, train.share_prefix, loss_average)


def _token_learner(
    session: Session, packing: PackingSettings, reference: Reference | None, objective: Objective | None
) -> TokenLearner:
    return TokenLearner(
        session.policy,
        reference,
        session.encoder,
        session.provider,
        session.mesh,
        packing,
        objective,
        session.run_state.progress,
    )


def build_loss(algorithm: AlgorithmConfig) -> PolicyLoss:
    """The loss of a recipe, corrected for the mismatch of trainer and engine if it says so."""
    loss = LOSSES[algorithm.loss](algorithm)
    if algorithm.correction == "none":
        return loss
    return CorrectedLoss(loss, CORRECTIONS[algorithm.correction](algorithm))


def build_answers(cfg: SftConfig, session: Session, loader: RowLoader) -> AnswerSource:
    return AnswerSource(
        loader,
        session.prompts,
        session.encoder,
        session.quarantine,
        session.run_state.progress,
        cfg.train.num_steps,
        build_answer_encoder(cfg, session.tokenizer),
    )
