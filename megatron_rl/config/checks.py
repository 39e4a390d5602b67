# SPDX-License-Identifier: Apache-2.0
"""Checks of a recipe that need more than one field: ranges, exclusions, parallel sizes against the model, files.

Everything that can be known before a GPU is touched is said here, in one message. Imports no torch.
"""

from __future__ import annotations

import difflib
import fnmatch
import netrc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from data.rows.loader import weight_problems
from data.rows.sources import source_names, source_problems
from data.rows.templates import template_problems
from data.video.frames import FrameSettings
from megatron_rl.config.schema import JobConfig, RlConfig
from megatron_rl.config.sizes import rank_problems, size_problems, trainer_grid
from megatron_rl.errors import raise_all
from megatron_rl.rewards.registry import load_reward
from megatron_rl.runtime.grid import Grid
from model_providers.family import Config, family_of, read_config, shape_and_weights, text_section
from model_providers.hf_files import misfits, read_tensor_files, tied_copy_problem, tokenizer_problems
from model_providers.shape import TransformerShape
from model_providers.weight_map import WeightMap

Job = Literal["rl", "sft", "cache"]

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (  # what a value must be, the test for it, and the keys
    (
        "at least 1",
        lambda value: value >= 1,
        "parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.context parallel.expert "
        "rollout.tensor rollout.num_samples data.min_frames "
        "rollout.max_response_tokens train.max_answer_tokens "
        "rollout.max_num_seqs rollout.sync_buffer_mib data.max_frames data.min_pixels "
        "data.max_pixels data.max_prompt_tokens data.decode_threads data.frames_per_chunk "
        "algorithm.max_filter_rounds train.num_steps "
        "train.prompts_per_step train.updates_per_step train.max_tokens_per_microbatch eval.batch_size checkpoint.keep",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "data.total_pixels data.prefetch_mib max_phase_minutes "
        "seed data.num_frames data.fps rollout.max_model_len rollout.kv_cache_gib algorithm.kl_coef eval.every "
        "eval.show train.optimizer.lr train.optimizer.weight_decay train.optimizer.warmup_steps checkpoint.every",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "data.cache_gib algorithm.correction_cap algorithm.clip_high train.optimizer.eps train.optimizer.max_grad_norm",
    ),
    ("at least 0.01: vLLM samples at no lower one", lambda value: value >= 0.01, "rollout.temperature"),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "rollout.gpu_memory_utilization"),
    ("between 0 and 1, both excluded", lambda value: 0 < value < 1, "algorithm.clip_low"),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "data.max_bad_fraction"),
    ("above 1 (3.0 is usual)", lambda value: value > 1, "algorithm.clip_dual"),
    ("two numbers from 0 to below 1", lambda betas: all(0 <= beta < 1 for beta in betas), "train.optimizer.betas"),
    ("the name of a folder", bool, "run_dir model.hf"),
)


_METRICS = (
    "eval/accuracy eval/start_accuracy eval/blind_accuracy eval/num_prompts critic/score/mean critic/score/max "
    "critic/score/min sft/nll sft/num_samples sft/num_tokens reward/* actor/* rollout/* response_length/* "
    "prompt_length/* sync/* vision/* eval_vision/* data/* timing_s/*"
)
"""Names of the metrics of a step; those with a * have more behind it, some of the user's own."""


def check(cfg: JobConfig, world_size: int, job: Job, require_files: bool = True) -> None:
    """Raise one ValueError with every problem; `require_files=False` checks the numbers only. The job "cache" takes the
    recipe of another job."""
    problems = [
        *_ranges(cfg),
        *_data(cfg),
        *(_cache(cfg) if job == "cache" else _parallel(cfg, world_size)),
        *_lengths(cfg),
        *_best_metric(cfg),
        *_log(cfg),
    ]
    if job == "rl":
        assert isinstance(cfg, RlConfig)
        problems += [*_rollout(cfg), *_algorithm(cfg)]
    if require_files:
        problems += [*_files(cfg, job), *_model(cfg, world_size, job), *([] if job == "cache" else _checkpoints(cfg))]
    raise_all(problems, f"configuration of {cfg.run_dir}")


def check_inputs(cfg: JobConfig) -> None:
    """Raise one ValueError with every problem of what a job reads. Weights, layouts, rewards are not looked at."""
    job: Job = "rl" if isinstance(cfg, RlConfig) else "sft"
    raise_all([*_ranges(cfg), *_data(cfg), *_files(cfg, job), *_family(cfg)], f"configuration of {cfg.run_dir}")


def range_problems(cfg: JobConfig) -> list[str]:
    """Values out of their range, and settings of data that exclude each other."""
    return [*_ranges(cfg), *_data(cfg)]


def _has(cfg: JobConfig, path: str) -> bool:
    """Whether the schema of the recipe has the key."""
    value: Any = cfg
    for key in path.split("."):
        if not hasattr(value, key):
            return False
        value = getattr(value, key)
    return True


def _at(cfg: JobConfig, path: str) -> Any:
    value: Any = cfg
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _problem(cfg: JobConfig, path: str, why: str) -> str:
    value = _at(cfg, path)
    return f"{path}={str(value).lower() if isinstance(value, bool) else value}: {why}"


def _ranges(cfg: JobConfig) -> Iterator[str]:
    for wanted, holds, paths in _RANGES:
        for path in filter(partial(_has, cfg), paths.split()):
            if not holds(_at(cfg, path)):
                yield _problem(cfg, path, f"out of range; it must be {wanted}")


def _data(cfg: JobConfig) -> Iterator[str]:
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
    if isinstance(cfg, RlConfig) and not data.eval and (cfg.eval.every > 0 or cfg.eval.blind):
        path = "eval.every" if cfg.eval.every > 0 else "eval.blind"
        yield _problem(cfg, path, "there is nothing to evaluate; set data.eval")


def _cache(cfg: JobConfig) -> Iterator[str]:
    """Filling the cache takes any number of ranks."""
    if not cfg.data.cache_dir:
        yield "data.cache_dir=: there is nothing to fill; set it to a folder"


def _parallel(cfg: JobConfig, world_size: int) -> Iterator[str]:
    engine = Grid(world_size, tensor=cfg.rollout.tensor) if isinstance(cfg, RlConfig) else None
    yield from rank_problems(trainer_grid(cfg.parallel, world_size), engine)


def _lengths(cfg: JobConfig) -> Iterator[str]:
    if isinstance(cfg, RlConfig):
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


def _best_metric(cfg: JobConfig) -> Iterator[str]:
    """A name that no step has would make nothing the best, without a word."""
    name, names = cfg.checkpoint.best_metric, _METRICS.split()
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
        return
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {close[0]}?" if close else f"take one of {', '.join(names)}"
    yield _problem(cfg, "checkpoint.best_metric", f"no step has a metric of that name; {guess}")


def _checkpoints(cfg: JobConfig) -> Iterator[str]:
    if cfg.checkpoint.export_hf and not cfg.checkpoint.save_at_end:
        yield _problem(cfg, "checkpoint.export_hf", "exports the last checkpoint; set checkpoint.save_at_end=true too")
    old = sorted(path.name for path in (Path(cfg.run_dir) / "checkpoints").glob("step_*"))
    if old and not cfg.checkpoint.resume:
        why = f"{cfg.run_dir} holds checkpoints of another run ({old[0]} ...); use a new run_dir or remove them"
        yield _problem(cfg, "checkpoint.resume", why)


def _rollout(cfg: RlConfig) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.only and cfg.checkpoint.export_hf:
        yield _problem(cfg, "checkpoint.export_hf", "rollout.only=true learns nothing to export; unset one of them")
    if rollout.only and not rollout.save_to:
        yield _problem(cfg, "rollout.only", "the rollouts would be lost; set rollout.save_to")
    for path in ("rollout.only", "rollout.save_to"):
        if rollout.replay_from and _at(cfg, path):
            yield _problem(cfg, path, f"rollout.replay_from={rollout.replay_from} generates nothing; unset one of them")


def _algorithm(cfg: RlConfig) -> Iterator[str]:
    algorithm = cfg.algorithm
    if cfg.rollout.num_samples == 1 and not cfg.rollout.only:
        why = f"algorithm.advantage={algorithm.advantage} compares the responses of a prompt; use 2 or more"
        yield _problem(cfg, "rollout.num_samples", why)
    if algorithm.filter_low >= algorithm.filter_high:
        why = f"is not below algorithm.filter_high={algorithm.filter_high}; no group could pass"
        yield _problem(cfg, "algorithm.filter_low", why)
    try:
        load_reward(cfg.reward.name, cfg.reward.terms, cfg.reward.missing_answer)
    except ValueError as error:
        yield from str(error).splitlines()


def _files(cfg: JobConfig, job: Job) -> Iterator[str]:
    replays = job == "rl" and isinstance(cfg, RlConfig) and cfg.rollout.replay_from
    if not cfg.data.train and not replays:
        yield "data.train=: there is nothing to train on; set it to a JSONL file"
    for path in ("data.train", "data.eval"):
        yield from source_problems(_at(cfg, path), path)
    yield from weight_problems(len(source_names(cfg.data.train)), cfg.data.weights)
    for path in ("data.format_prompt", "data.manifest"):
        if _at(cfg, path) and not Path(_at(cfg, path)).expanduser().is_file():
            yield _problem(cfg, path, "no such file; check the path")
    if cfg.data.format_prompt and Path(cfg.data.format_prompt).expanduser().is_file():
        yield from template_problems(cfg.data.format_prompt)
    for path in ("model.weights_from", "data.media_root", "rollout.replay_from"):
        if _has(cfg, path) and _at(cfg, path) and not Path(_at(cfg, path)).expanduser().is_dir():
            yield _problem(cfg, path, "no such folder; check the path")


# ------------------------------------------------------------------------------------- the model's own configuration


def _family(cfg: JobConfig) -> Iterator[str]:
    """Whether the model's configuration can be read, and is of a family that is known."""
    try:
        family_of(read_config(cfg.model.hf), cfg.model.hf)
    except ValueError as error:
        yield str(error)


def _model(cfg: JobConfig, world_size: int, job: Job) -> Iterator[str]:
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
    yield from _fits_positions(cfg, text["max_position_embeddings"])
    yield from _fits_provider(cfg, hf, world_size, job)
    if "vision_config" not in hf:
        yield from _takes_text_only(cfg)
    patch = hf.get("vision_config", {}).get("temporal_patch_size", 1)
    if cfg.data.num_frames > 0:
        yield from FrameSettings(cfg.data.num_frames).problems(patch)


def _takes_text_only(cfg: JobConfig) -> Iterator[str]:
    """Settings that a model without an encoder has no use for."""
    if not cfg.model.freeze_vision:
        yield _problem(cfg, "model.freeze_vision", "the model has no vision tower that could be trained; use true")
    if cfg.data.cache_dir:
        yield _problem(cfg, "data.cache_dir", "the model takes no media whose embeddings could be kept; unset it")
    if isinstance(cfg, RlConfig) and cfg.eval.blind and cfg.data.eval:
        yield _problem(cfg, "eval.blind", "the model takes no media that could be blanked; use false")


def _fits_provider(cfg: JobConfig, hf: Config, world_size: int, job: Job) -> Iterator[str]:
    """What the model's own weight table has to say."""
    try:
        shape, weights = shape_and_weights(hf, cfg.model.hf)
    except ValueError as error:  # one problem, or several below a heading
        yield from str(error).splitlines()[1:] or [str(error)]
        return
    names = list(weights.entries)
    yield from _fits_files(cfg, shape, weights)
    yield from _fits_sizes(cfg, shape, world_size, job)
    for pattern in cfg.model.freeze:
        if not fnmatch.filter(names, pattern):
            yield f"model.freeze={pattern}: matches no parameter; names look like {names[0]}"
    all_frozen = all(any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.model.freeze) for name in names)
    if all_frozen and cfg.model.freeze_vision:
        yield _problem(cfg, "model.freeze", "nothing is left to train; freeze less")


def _fits_files(cfg: JobConfig, shape: TransformerShape, weights: WeightMap) -> Iterator[str]:
    """Headers of the weights and the tokenizer's vocabulary, against config.json."""
    folder = Path(cfg.model.hf)
    for problem in tokenizer_problems(folder, shape.vocab_size):
        yield f"model.hf={problem}"
    try:
        stored = read_tensor_files(folder)
    except ValueError as error:
        yield f"model.hf={error}"
        return
    for problem in misfits(stored, {tensor.name: tensor.shape for tensor in weights.hf_tensors().values()}):
        yield f"model.hf={folder}: {problem}"
    if shape.tied_embeddings:
        embedding = weights["output_layer.weight"].hf[0].name
        if problem := tied_copy_problem(folder, stored, embedding):
            yield f"model.hf={problem}"


def _fits_positions(cfg: JobConfig, longest: int) -> Iterator[str]:
    if cfg.max_model_len > longest:
        why = f"prompt + response may have {cfg.max_model_len} tokens, the model takes {longest}; lower it"
        is_set = isinstance(cfg, RlConfig) and cfg.rollout.max_model_len
        yield _problem(cfg, "rollout.max_model_len" if is_set else "data.max_prompt_tokens", why)


def _fits_sizes(cfg: JobConfig, shape: TransformerShape, world_size: int, job: Job) -> Iterator[str]:
    """Parallel sizes against the model's; whether they fit the ranks is not asked here."""
    engine = Grid(1, tensor=cfg.rollout.tensor) if job == "rl" and isinstance(cfg, RlConfig) else None
    yield from size_problems(trainer_grid(cfg.parallel, 1), engine, shape, cfg.parallel.context_comm, world_size)
    if shape.num_experts and cfg.checkpoint.export_hf:
        yield _problem(cfg, "checkpoint.export_hf", "exporting experts is not built yet; use false")


# ----------------------------------------------------------------------------------------------------------- logging


def _log(cfg: JobConfig) -> Iterator[str]:
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
