# SPDX-License-Identifier: Apache-2.0
"""Which layouts a recipe could have, which of them fit, and which is predicted to be fastest; what a setting would
change; how many frames fit at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.schema import RlConfig
from megatron_rl.config.sizes import rank_problems, size_problems, trainer_grid
from megatron_rl.errors import raise_all
from megatron_rl.planner.engine import kv_bytes
from megatron_rl.planner.gpus import GIB, GPUS_PER_NODE, Gpu
from megatron_rl.planner.layout import BYTES, layout_name
from megatron_rl.planner.memory import Case, Memory, plan_memory, updates_beside_state
from megatron_rl.planner.model import PlannedModel
from megatron_rl.planner.times import Times, predict
from megatron_rl.planner.workload import Assumptions, pack_step, workload_of, workload_problems
from megatron_rl.runtime.grid import Grid

MAX_FRAMES = 1 << 17
SAME_TIME = 0.03  # predictions that differ by less than this part are taken for equal


@dataclass(frozen=True, slots=True)
class Machine:
    """`world` GPUs of one kind, and what is assumed about the work on them."""

    gpu: Gpu
    world: int
    assumed: Assumptions


@dataclass(frozen=True, slots=True)
class Option:
    """A recipe that could be run, what it needs and how long a step is predicted to take."""

    cfg: RlConfig
    case: Case
    memory: Memory
    times: Times

    @property
    def layout(self) -> str:
        """Both grids, for people."""
        return layout_name(self.case.trainer, self.case.engine)

    @property
    def shortage(self) -> float:
        """Bytes that the fullest phase lacks; at or below 0, it fits."""
        return self.memory.peak - self.memory.capacity


@dataclass(frozen=True, slots=True)
class Knob:
    """A recipe setting, and what the recipe would need with it."""

    setting: str
    option: Option


@dataclass(frozen=True, slots=True)
class FrameLimit:
    """The largest number of frames that fits, the fastest layout that takes it, and what stops the next larger one."""

    num_frames: int
    option: Option | None
    stopped_by: str


def with_settings(cfg: RlConfig, settings: dict[str, Any]) -> RlConfig:
    """A copy with `section.key: value` replaced."""
    for path, value in settings.items():
        section, key = path.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{key: value})})
    return cfg


def evaluate(cfg: RlConfig, model: PlannedModel, machine: Machine) -> Option:
    """What the recipe needs on this machine. Raises ValueError where it could not even start."""
    case = _case(cfg, model, machine)
    if case is None:
        raise_all(workload_problems(cfg, model, workload_of(cfg, model, machine.assumed)), "recipe")
        raise AssertionError("unreachable: a sequence is too long")
    return Option(cfg, case, plan_memory(case), predict(case))


def _case(cfg: RlConfig, model: PlannedModel, machine: Machine) -> Case | None:
    work, train = workload_of(cfg, model, machine.assumed), cfg.train
    trainer, engine = trainer_grid(cfg.parallel, machine.world), Grid(machine.world, tensor=cfg.rollout.tensor)
    packing = pack_step(
        work,
        train.max_tokens_per_microbatch,
        trainer.data,
        model.shape.hidden_size,
        train.share_prefix,
        train.updates_per_step,
        trainer.pipeline if trainer.virtual > 1 else 1,
    )
    if packing is None:
        return None
    return Case(cfg, model, machine.gpu, trainer, engine, work, packing, machine.assumed)


# -------------------------------------------------------------------------------------------------------------- layouts


def parallel_problems(cfg: RlConfig, model: PlannedModel, world: int) -> list[str]:
    """What the checks of a recipe say about its parallel sizes; the length of the context is not asked here."""
    trainer, engine = trainer_grid(cfg.parallel, world), Grid(world, tensor=cfg.rollout.tensor)
    of_model = size_problems(trainer, engine, model.shape, cfg.parallel.context_comm)
    return [*of_model, *rank_problems(trainer, engine)]


def layouts(cfg: RlConfig, model: PlannedModel, world: int) -> Iterator[RlConfig]:
    """The recipe at every size of both grids that its checks allow. The engine's replicas stay within a node."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tensor in sizes:
        for pipeline in sizes:
            for context in sizes:
                if world % (tensor * pipeline * context):
                    continue
                grid = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.context": context}
                if pipeline <= 2:
                    grid["parallel.virtual_pipeline"] = 1
                one = with_settings(cfg, {**grid, "rollout.tensor": 1})
                if parallel_problems(one, model, world):
                    continue
                for rollout in (n for n in sizes if n <= GPUS_PER_NODE):
                    candidate = with_settings(one, {"rollout.tensor": rollout})
                    if not parallel_problems(candidate, model, world):
                        yield candidate


def search(cfg: RlConfig, model: PlannedModel, machine: Machine, tight_cache: bool = False) -> list[Option]:
    """All layouts: those that fit first, by predicted time; then the others, by what they lack. `tight_cache`: a KV
    cache for one prompt and its responses, instead of the recipe's."""
    candidates: Iterable[RlConfig] = layouts(cfg, model, machine.world)
    if tight_cache:
        candidates = (with_tight_cache(one, model, machine.assumed) for one in candidates)
    cases = [(one, _case(one, model, machine)) for one in candidates]
    options = [Option(one, case, plan_memory(case), predict(case)) for one, case in cases if case is not None]
    return sorted(options, key=lambda o: (not o.memory.fits, o.times.step if o.memory.fits else o.shortage))


def suggested(options: Sequence[Option]) -> Option | None:
    """Of those that fit and are nearly as fast as the fastest, the one with most memory to spare."""
    fitting = [o for o in options if o.memory.fits]
    if not fitting:
        return None
    limit = fitting[0].times.step * (1 + SAME_TIME)
    return min((o for o in fitting if o.times.step <= limit), key=lambda o: o.memory.peak)


def with_tight_cache(cfg: RlConfig, model: PlannedModel, assumed: Assumptions) -> RlConfig:
    tokens = max(workload_of(cfg, model, assumed).group_tokens, cfg.max_model_len)
    size = tokens * kv_bytes(model.shape, cfg.rollout.tensor, BYTES[cfg.model.dtype])
    return with_settings(cfg, {"rollout.kv_cache_gib": math.ceil(100 * size / GIB) / 100})


# ---------------------------------------------------------------------------------------------------------------- knobs


def helpful_knobs(option: Option, machine: Machine) -> list[Knob]:
    """Settings, one at a time, that make the recipe fit or lower what it lacks; those that make it fit first."""
    model, found = option.case.model, []
    for settings in _changes(option):
        cfg = with_settings(option.cfg, settings)
        if parallel_problems(cfg, model, machine.world):
            continue
        case = _case(cfg, model, machine)
        if case is None:
            continue
        changed = Option(cfg, case, plan_memory(case), predict(case))
        fewer_problems = len(changed.memory.engine.problems) < len(option.memory.engine.problems)
        if changed.memory.fits or changed.shortage < option.shortage - 1e6 or fewer_problems:
            setting = " ".join(f"{path}={value}" for path, value in settings.items())
            found.append(Knob(setting, changed))
    return sorted(found, key=lambda k: (not k.option.memory.fits, k.option.memory.peak))


def _changes(option: Option) -> Iterator[dict[str, Any]]:
    cfg, work = option.cfg, option.case.work
    modes = ("none", "selective", "full")
    yield from ({"model.recompute": mode} for mode in modes[modes.index(cfg.model.recompute) + 1 :])
    for key in ("context", "tensor", "pipeline"):
        yield {f"parallel.{key}": 2 * getattr(cfg.parallel, key)}
    if updates_beside_state(cfg):
        yield {"train.offload_optimizer": True}
    if cfg.train.max_tokens_per_microbatch > cfg.max_model_len >= work.longest:
        yield {"train.max_tokens_per_microbatch": cfg.max_model_len}
    if cfg.data.eval and cfg.eval.batch_size > cfg.train.prompts_per_step:
        yield {"eval.batch_size": cfg.train.prompts_per_step}
    if cfg.train.prompts_per_step % (2 * cfg.train.updates_per_step) == 0:
        yield {"train.prompts_per_step": cfg.train.prompts_per_step // 2}
    yield {"rollout.tensor": 2 * cfg.rollout.tensor}
    if cfg.rollout.kv_cache_gib > 0:
        yield {"rollout.kv_cache_gib": cfg.rollout.kv_cache_gib / 2}
        yield {"rollout.kv_cache_gib": cfg.rollout.kv_cache_gib * 2}
    else:
        for util in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            if abs(util - cfg.rollout.gpu_memory_utilization) > 0.01:
                yield {"rollout.gpu_memory_utilization": util}
    yield from _smaller_videos(option)


def _smaller_videos(option: Option) -> Iterator[dict[str, Any]]:
    """Half the frames, or frames of half the area; micro-batches shrink by what a prompt does."""
    cfg, case = option.cfg, option.case
    if case.model.tower is None or case.work.num_frames < 2 * case.model.tower.temporal_patch:
        return
    patch = case.model.tower.temporal_patch
    changes: list[dict[str, Any]] = [{"data.num_frames": case.work.num_frames // (2 * patch) * patch}]
    changes[0] |= {"data.fps": 0.0} if cfg.data.fps else {}
    if cfg.data.max_pixels // 2 >= cfg.data.min_pixels:
        changes.append({"data.max_pixels": cfg.data.max_pixels // 2})
    for change in changes:
        work = workload_of(with_settings(cfg, change), case.model, case.assumed)
        budget = cfg.train.max_tokens_per_microbatch - (case.work.video_tokens - work.video_tokens)
        yield change | {"train.max_tokens_per_microbatch": max(budget, work.longest)}


def larger_budget(option: Option, machine: Machine) -> Knob | None:
    """The micro-batch that holds a prompt with all of its responses, where the recipe's does not and it would fit: each
    prompt is then computed once."""
    cfg, work = option.cfg, option.case.work
    if not cfg.train.share_prefix or cfg.train.max_tokens_per_microbatch >= work.group_tokens:
        return None
    settings = {"train.max_tokens_per_microbatch": work.group_tokens}
    changed = evaluate(with_settings(cfg, settings), option.case.model, machine)
    better = changed.memory.fits and changed.times.step < option.times.step
    return Knob(f"train.max_tokens_per_microbatch={work.group_tokens}", changed) if better else None


# --------------------------------------------------------------------------------------------------------------- frames


def with_frames(cfg: RlConfig, model: PlannedModel, assumed: Assumptions, num_frames: int) -> RlConfig:
    """The recipe on longer videos: room for the prompt, micro-batches that hold a prompt with all of its responses."""
    cfg = with_settings(cfg, {"data.num_frames": num_frames, "data.fps": 0.0, "rollout.max_model_len": 0})
    work = workload_of(cfg, model, assumed)
    budget = work.group_tokens if cfg.train.share_prefix else work.longest
    settings = {"data.max_prompt_tokens": work.prompt_tokens, "train.max_tokens_per_microbatch": budget}
    return with_settings(cfg, settings)


def largest_frames(cfg: RlConfig, model: PlannedModel, machine: Machine) -> FrameLimit:
    """By bisection, to 1 % or one temporal patch, over all layouts, with full recomputation and a KV cache for one
    prompt and its responses; text and other settings of the recipe stay."""
    assert model.tower is not None, "a text model takes no frames"
    cfg = with_settings(cfg, {"model.recompute": "full"})
    patch = model.tower.temporal_patch

    def options(frames: int) -> Sequence[Option]:
        return search(with_frames(cfg, model, machine.assumed, frames), model, machine, tight_cache=True)

    grids = [one for one in layouts(cfg, model, machine.world)]

    def fits(frames: int) -> bool:
        """Tried first: the grid that took the last number of frames."""
        for index, grid in enumerate(grids):
            longer = with_tight_cache(with_frames(grid, model, machine.assumed, frames), model, machine.assumed)
            case = _case(longer, model, machine)
            if case is not None and plan_memory(case).fits:
                grids.insert(0, grids.pop(index))
                return True
        return False

    good, bad = 0, patch
    while bad <= MAX_FRAMES and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(patch, good // 100):
        middle = (good + bad) // 2 // patch * patch
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    best = options(good)[0] if good else None
    return FrameLimit(good, best, what_is_missing(options(bad)))


def what_is_missing(options: Sequence[Option]) -> str:
    """Why the option that comes closest does not fit."""
    if not options:
        return "no layout divides the GPUs and the model"
    closest = min(options, key=lambda o: (bool(o.memory.engine.problems), o.shortage))
    return reason(closest)


def reason(option: Option) -> str:
    over = [f"{p.phase} needs {p.total / GIB:.1f} GiB" for p in option.memory.over]
    if option.memory.engine.problems:
        over.append(f"KV cache of {option.memory.engine.kv_tokens:,} tokens is too small for one sequence")
    return "; ".join(over) or "fits"
