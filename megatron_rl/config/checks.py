# SPDX-License-Identifier: Apache-2.0
"""Checks of a RunConfig that need more than one field: ranges, exclusions, parallel sizes against the model, files.

Everything that can be known before a GPU is touched is said here, in one message. Imports no torch.
"""

from __future__ import annotations

import fnmatch
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from data.rows.loader import weight_problems
from data.rows.prompts import template_problems
from data.rows.sources import source_names, source_problems
from data.video.frames import FrameSettings
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import raise_all
from megatron_rl.rewards.registry import load_reward
from model_providers.family import Config, read_config, shape_and_weights, text_section

Job = Literal["rl", "sft", "cache"]

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (  # what a value must be, the test for it, and the keys
    (
        "at least 1",
        lambda value: value >= 1,
        "parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.context parallel.expert "
        "rollout.tensor rollout.num_samples data.min_frames "
        "rollout.max_response_tokens rollout.max_num_seqs rollout.sync_buffer_mib data.max_frames data.min_pixels "
        "data.max_pixels data.max_prompt_tokens data.decode_threads data.frames_per_chunk "
        "algorithm.max_filter_rounds train.num_steps "
        "train.prompts_per_step train.updates_per_step train.max_tokens_per_microbatch eval.batch_size checkpoint.keep",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "data.total_pixels data.prefetch_mib "
        "seed data.num_frames data.fps rollout.max_model_len rollout.kv_cache_gib algorithm.kl_coef eval.every "
        "eval.show train.optimizer.lr train.optimizer.weight_decay train.optimizer.warmup_steps checkpoint.every",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "rollout.temperature data.cache_gib algorithm.correction_cap "
        "algorithm.clip_high train.optimizer.eps train.optimizer.max_grad_norm",
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "rollout.gpu_memory_utilization"),
    ("between 0 and 1, both excluded", lambda value: 0 < value < 1, "algorithm.clip_low"),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "data.max_bad_fraction reward.format_weight"),
    ("above 1 (3.0 is usual)", lambda value: value > 1, "algorithm.clip_dual"),
    ("two numbers from 0 to below 1", lambda betas: all(0 <= beta < 1 for beta in betas), "train.optimizer.betas"),
    ("the name of a folder", bool, "run_dir model.hf"),
)


def check(cfg: RunConfig, world_size: int, job: Job, require_files: bool = True) -> None:
    """Raise one ValueError with every problem; `require_files=False` checks the numbers only."""
    problems = [
        *_ranges(cfg),
        *_data(cfg),
        *(_cache(cfg) if job == "cache" else _parallel(cfg, world_size, job)),
        *_lengths(cfg),
        *_log(cfg),
    ]
    if job == "rl":
        problems += [*_rollout(cfg), *_algorithm(cfg)]
    if require_files:
        problems += [*_files(cfg, job), *_model(cfg, job), *([] if job == "cache" else _checkpoints(cfg))]
    raise_all(problems, f"configuration of {cfg.run_dir}")


def range_problems(cfg: RunConfig) -> list[str]:
    """Values out of their range, and settings of data that exclude each other."""
    return [*_ranges(cfg), *_data(cfg)]


def _at(cfg: RunConfig, path: str) -> Any:
    value: Any = cfg
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _problem(cfg: RunConfig, path: str, why: str) -> str:
    value = _at(cfg, path)
    return f"{path}={str(value).lower() if isinstance(value, bool) else value}: {why}"


def _ranges(cfg: RunConfig) -> Iterator[str]:
    for wanted, holds, paths in _RANGES:
        for path in paths.split():
            if not holds(_at(cfg, path)):
                yield _problem(cfg, path, f"out of range; it must be {wanted}")


def _data(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    if data.num_frames > 0 and data.fps > 0:
        yield _problem(cfg, "data.fps", f"data.num_frames={data.num_frames} is set as well; set one of them to 0")
    if data.num_frames == 0 and data.fps == 0:
        yield _problem(cfg, "data.num_frames", "data.fps is 0 as well; set one of them")
    if data.min_pixels > data.max_pixels:
        yield _problem(cfg, "data.min_pixels", f"exceeds data.max_pixels={data.max_pixels}; swap them")
    if data.cache_dir and not cfg.model.freeze_vision:
        why = "what it would hold is trained by model.freeze_vision=false and changes every step; unset one of them"
        yield _problem(cfg, "data.cache_dir", why)
    if data.cache_dir and Path(data.cache_dir).exists() and not Path(data.cache_dir).is_dir():
        yield _problem(cfg, "data.cache_dir", "is a file; give a folder")
    if not data.eval and (cfg.eval.every > 0 or cfg.eval.blind):
        path = "eval.every" if cfg.eval.every > 0 else "eval.blind"
        yield _problem(cfg, path, "there is nothing to evaluate; set data.eval")


def _cache(cfg: RunConfig) -> Iterator[str]:
    """Filling the cache takes any number of ranks."""
    if not cfg.data.cache_dir:
        yield "data.cache_dir=: there is nothing to fill; set it to a folder"


def _parallel(cfg: RunConfig, world_size: int, job: Job) -> Iterator[str]:
    parallel = cfg.parallel
    size = parallel.tensor * parallel.pipeline * parallel.context
    if size > 0 and world_size % size:
        product = f"{parallel.tensor} * {parallel.pipeline} * {parallel.context}"
        fix = f"start a multiple of {size} processes or change the parallel sizes"
        yield f"parallel.tensor * pipeline * context={product}: does not divide {world_size} ranks; {fix}"
    elif size > 0 and parallel.expert > 0 and world_size // parallel.pipeline % parallel.expert:
        ranks = world_size // parallel.pipeline
        yield _problem(cfg, "parallel.expert", f"does not divide the {ranks} ranks of a stage; use a divisor")
    if job == "rl" and cfg.rollout.tensor > 0 and world_size % cfg.rollout.tensor:
        yield _problem(cfg, "rollout.tensor", f"does not divide {world_size} ranks; use a divisor")


def _lengths(cfg: RunConfig) -> Iterator[str]:
    need = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    if need > cfg.max_model_len:
        parts = f"data.max_prompt_tokens + rollout.max_response_tokens = {need}"
        yield _problem(cfg, "rollout.max_model_len", f"is below {parts}; raise it, or 0 to derive it")
    if cfg.train.max_tokens_per_microbatch < cfg.max_model_len:
        why = f"the longest sequence has {cfg.max_model_len} tokens and must fit; raise it to that"
        yield _problem(cfg, "train.max_tokens_per_microbatch", why)
    if cfg.train.updates_per_step > 0 and cfg.train.prompts_per_step % cfg.train.updates_per_step:
        why = f"is not a multiple of train.updates_per_step={cfg.train.updates_per_step}; make it one"
        yield _problem(cfg, "train.prompts_per_step", why)


def _checkpoints(cfg: RunConfig) -> Iterator[str]:
    if cfg.checkpoint.export_hf and not cfg.checkpoint.save_at_end:
        yield _problem(cfg, "checkpoint.export_hf", "exports the last checkpoint; set checkpoint.save_at_end=true too")
    old = sorted(path.name for path in (Path(cfg.run_dir) / "checkpoints").glob("step_*"))
    if old and not cfg.checkpoint.resume:
        why = f"{cfg.run_dir} holds checkpoints of another run ({old[0]} ...); use a new run_dir or remove them"
        yield _problem(cfg, "checkpoint.resume", why)


def _rollout(cfg: RunConfig) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.only and not rollout.save_to:
        yield _problem(cfg, "rollout.only", "the rollouts would be lost; set rollout.save_to")
    for path in ("rollout.only", "rollout.save_to"):
        if rollout.replay_from and _at(cfg, path):
            yield _problem(cfg, path, f"rollout.replay_from={rollout.replay_from} generates nothing; unset one of them")


def _algorithm(cfg: RunConfig) -> Iterator[str]:
    algorithm = cfg.algorithm
    if cfg.rollout.num_samples == 1 and not cfg.rollout.only:
        why = f"algorithm.advantage={algorithm.advantage} compares the responses of a prompt; use 2 or more"
        yield _problem(cfg, "rollout.num_samples", why)
    if algorithm.filter_low >= algorithm.filter_high:
        why = f"is not below algorithm.filter_high={algorithm.filter_high}; no group could pass"
        yield _problem(cfg, "algorithm.filter_low", why)
    try:
        load_reward(cfg.reward.name, cfg.reward.format_weight)
    except ValueError as error:
        yield str(error)


def _files(cfg: RunConfig, job: Job) -> Iterator[str]:
    if not cfg.data.train and not (job == "rl" and cfg.rollout.replay_from):
        yield "data.train=: there is nothing to train on; set it to a JSONL file"
    for path in ("data.train", "data.eval"):
        yield from source_problems(_at(cfg, path), path)
    yield from weight_problems(len(source_names(cfg.data.train)), cfg.data.weights)
    for path in ("data.format_prompt", "data.manifest"):
        if _at(cfg, path) and not Path(_at(cfg, path)).is_file():
            yield _problem(cfg, path, "no such file; check the path")
    if cfg.data.format_prompt and Path(cfg.data.format_prompt).is_file():
        yield from template_problems(cfg.data.format_prompt)
    for path in ("model.weights_from", "data.media_root", "rollout.replay_from"):
        if _at(cfg, path) and not Path(_at(cfg, path)).is_dir():
            yield _problem(cfg, path, "no such folder; check the path")


# ------------------------------------------------------------------------------------- the model's own configuration


def _model(cfg: RunConfig, job: Job) -> Iterator[str]:
    try:
        hf = read_config(cfg.model.hf)
    except ValueError as error:
        yield str(error)
        return
    text = text_section(hf)
    keys = "num_attention_heads num_hidden_layers hidden_size intermediate_size max_position_embeddings".split()
    missing = [key for key in keys if not isinstance(text.get(key), int)]
    if missing:
        yield _problem(cfg, "model.hf", f"config.json lacks {', '.join(missing)}; is it a language model?")
        return
    yield from _fits_model(cfg, text)
    yield from _fits_provider(cfg, hf)
    if not cfg.model.freeze_vision and "vision_config" not in hf:
        yield _problem(cfg, "model.freeze_vision", "the model has no vision tower that could be trained; use true")
    patch = hf.get("vision_config", {}).get("temporal_patch_size", 1)
    if cfg.data.num_frames > 0:
        yield from FrameSettings(cfg.data.num_frames).problems(patch)
    if job == "rl":
        yield from _fits_engine(cfg, text)


def _fits_provider(cfg: RunConfig, hf: Config) -> Iterator[str]:
    """What the model's own weight table has to say."""
    try:
        names = list(shape_and_weights(hf, cfg.model.hf)[1].entries)
    except ValueError as error:  # one problem, or several below a heading
        yield from str(error).splitlines()[1:] or [str(error)]
        return
    for pattern in cfg.model.freeze:
        if not fnmatch.filter(names, pattern):
            yield f"model.freeze={pattern}: matches no parameter; names look like {names[0]}"
    all_frozen = all(any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.model.freeze) for name in names)
    if all_frozen and cfg.model.freeze_vision:
        yield _problem(cfg, "model.freeze", "nothing is left to train; freeze less")


def size_problems(cfg: RunConfig, text: Mapping[str, int]) -> list[str]:
    """Sizes of trainer and engine that do not go with the model's, whose config.json holds the integers `text`."""
    return [*_fits_model(cfg, text), *_fits_engine(cfg, text)]


def _fits_model(cfg: RunConfig, text: Mapping[str, int]) -> Iterator[str]:
    for key in ("num_attention_heads", "hidden_size", "intermediate_size"):
        yield from _divides(cfg, "parallel.tensor", key, text)
    yield from _divides(cfg, "parallel.pipeline", "num_hidden_layers", text)
    yield from _chunks(cfg, text["num_hidden_layers"])
    yield from _heads(cfg, text["num_attention_heads"])
    yield from _experts(cfg, text.get("num_experts", text.get("num_local_experts", 0)))
    yield from _kv_heads(cfg, "parallel.tensor", text)
    if cfg.max_model_len > text["max_position_embeddings"]:
        longest = text["max_position_embeddings"]
        why = f"prompt + response may have {cfg.max_model_len} tokens, the model takes {longest}; lower it"
        yield _problem(cfg, "rollout.max_model_len" if cfg.rollout.max_model_len else "data.max_prompt_tokens", why)


def _heads(cfg: RunConfig, num_heads: int) -> Iterator[str]:
    parallel = cfg.parallel
    if parallel.context_comm != "a2a" or parallel.context <= 1 or num_heads % (parallel.tensor * parallel.context) == 0:
        return
    why = f"{num_heads} heads / tensor={parallel.tensor} do not divide over context={parallel.context} ranks"
    yield _problem(cfg, "parallel.context_comm", f"{why}; use all_gather or p2p")


def _chunks(cfg: RunConfig, num_layers: int) -> Iterator[str]:
    stages, chunks = cfg.parallel.pipeline, cfg.parallel.virtual_pipeline
    if chunks > 1 and stages <= 2:  # between two stages, Megatron-core's two directions of messages get mixed up
        yield _problem(cfg, "parallel.virtual_pipeline", "needs parallel.pipeline above 2; use 1")
    elif chunks > 1 and num_layers % (stages * chunks):
        why = f"{stages} stages times {chunks} chunks do not divide the model's {num_layers} layers; use a divisor"
        yield _problem(cfg, "parallel.virtual_pipeline", why)


def _experts(cfg: RunConfig, num_experts: int) -> Iterator[str]:
    if cfg.parallel.expert > 1 and (not num_experts or num_experts % cfg.parallel.expert):
        yield _problem(cfg, "parallel.expert", f"does not divide the model's {num_experts} experts; use a divisor")
    if num_experts and cfg.checkpoint.export_hf:
        yield _problem(cfg, "checkpoint.export_hf", "exporting experts is not built yet; use false")


def _fits_engine(cfg: RunConfig, text: Mapping[str, int]) -> Iterator[str]:
    for key in ("num_attention_heads", "intermediate_size"):
        yield from _divides(cfg, "rollout.tensor", key, text)
    yield from _kv_heads(cfg, "rollout.tensor", text)


def _divides(cfg: RunConfig, path: str, key: str, text: Mapping[str, int]) -> Iterator[str]:
    size = _at(cfg, path)
    if size > 0 and text[key] % size:
        yield _problem(cfg, path, f"does not divide the model's {key} {text[key]}; use a divisor")


def _kv_heads(cfg: RunConfig, path: str, text: Mapping[str, int]) -> Iterator[str]:
    size, heads = _at(cfg, path), text.get("num_key_value_heads", text["num_attention_heads"])
    if size > 0 and size % heads and heads % size:
        yield _problem(
            cfg, path, f"neither divides nor is a multiple of the model's {heads} key-value heads; change it"
        )


# ----------------------------------------------------------------------------------------------------------- logging


def _log(cfg: RunConfig) -> Iterator[str]:
    if cfg.log.wandb == "online" and not os.environ.get("WANDB_API_KEY") and not _wandb_login():
        yield _problem(cfg, "log.wandb", "not logged in; run `wandb login`, set WANDB_API_KEY, or use offline")


def _wandb_login() -> bool:
    """Whether `wandb login` has left its entry in the netrc file."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if not path.is_file() or host is None:
        return False
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False
