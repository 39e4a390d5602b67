# SPDX-License-Identifier: Apache-2.0
"""Memory of one GPU in every phase of a step, item by item, in bytes: the fullest rank of the fullest stage.

Who holds what when is that of `loop.rl_step`: during `encode` and `generate` the engine is awake, gradients are freed
and optimizer state is in host memory; during `log-probs` and `update` the engine sleeps. The state stays away until the
first `optimizer step`, and with `train.offload_optimizer` between steps too. The vision encoder stays throughout; the
embeddings that a rank made are dropped once all are fetched for learning. Reference weights stay in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.schema import RlConfig
from megatron_rl.planner import activations as act
from megatron_rl.planner.engine import EngineNeed, engine_need
from megatron_rl.planner.gpus import Gpu
from megatron_rl.planner.layout import chunks_in_flight, split_of
from megatron_rl.planner.model import PlannedModel, StageParams, stage_params
from megatron_rl.planner.workload import Assumptions, Packing, Workload, fullest_share
from megatron_rl.runtime.grid import Grid
from megatron_rl.types import DECODED_BYTES
from model_providers.shape import TransformerShape

FP32 = 4
OPTIMIZER_STEP = "optimizer step"


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """{what: bytes} of one phase on its fullest rank, which is one of pipeline stage `stage`."""

    phase: str
    stage: int
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """All phases on one GPU; `host` is the main memory that one rank needs for what is offloaded to it."""

    phases: tuple[PhaseMemory, ...]
    engine: EngineNeed
    host: dict[str, float]
    capacity: int

    @property
    def over(self) -> list[PhaseMemory]:
        """Phases that do not fit."""
        return [phase for phase in self.phases if phase.total > self.capacity]

    @property
    def fits(self) -> bool:
        return not self.over and not self.engine.problems

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases)


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that memory and time depend on."""

    cfg: RlConfig
    model: PlannedModel
    gpu: Gpu
    trainer: Grid
    engine: Grid
    work: Workload
    packing: Packing
    assumed: Assumptions

    @property
    def split(self) -> act.ActivationSplit:
        return split_of(self.cfg)

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch that the recipe allows: its budget, if a rank has as many in an update."""
        return min(self.cfg.train.max_tokens_per_microbatch, self.packing.rows)

    @property
    def rows(self) -> int:
        """Of a rank in that micro-batch, padding included."""
        work, split = self.work, self.split
        responses = max(1, round(self.packing.responses_a_bundle))
        args = work.prompt_tokens, work.response_tokens, responses, split.context, self.model.shape.hidden_size
        return math.ceil(self.largest * fullest_share(*args) / split.tensor) * split.tensor

    @property
    def response_rows(self) -> int:
        """Response tokens of that micro-batch that a rank predicts."""
        per_bundle = self.packing.responses_a_bundle * self.work.response_tokens
        share = per_bundle / (self.work.prompt_tokens + per_bundle)
        return math.ceil(self.largest * share / self.split.context)

    def params(self, stage: int) -> StageParams:
        sizes = self.trainer
        return stage_params(self.model, sizes.tensor, sizes.pipeline, stage, sizes.expert, self.cfg.model.freeze)


def plan_memory(case: Case) -> Memory:
    need = engine_need(case.cfg, case.model, case.gpu, case.work)
    stages = sorted({0, case.trainer.pipeline - 1})
    phases = []
    for phase in phase_names(case.cfg):
        found = [PhaseMemory(phase, stage, dict(_items(case, need, phase, stage))) for stage in stages]
        phases.append(max(found, key=lambda f: f.total))
    return Memory(tuple(phases), need, host_bytes(case, need), case.gpu.memory)


def phase_names(cfg: RlConfig) -> list[str]:
    """In the order of a step. An evaluation counts where it takes more prompts at a time than a step does."""
    names = ["encode", "generate"]
    if cfg.data.eval and cfg.eval.batch_size > cfg.train.prompts_per_step:
        names.append("evaluate")
    log_probs = ["log-probs"] if passes_without_gradients(cfg) else []
    return [*names, *log_probs, "update", *([] if updates_beside_state(cfg) else [OPTIMIZER_STEP])]


def updates_beside_state(cfg: RlConfig) -> bool:
    """Whether optimizer state is on the GPU while an update computes: from the second one on, if it may stay."""
    return cfg.train.updates_per_step > 1 and not cfg.train.offload_optimizer


def passes_without_gradients(cfg: RlConfig) -> int:
    """Over all that a step trains on: the old log-probabilities, if there is a second update, and the reference's."""
    return int(cfg.train.updates_per_step > 1) + int(cfg.algorithm.kl_coef > 0)


def _items(case: Case, need: EngineNeed, phase: str, stage: int) -> Iterator[tuple[str, float]]:
    params = case.params(stage)
    yield "reserve", case.assumed.reserve
    yield "weights", params.total * case.split.element
    if case.model.tower is not None:
        yield "vision tower", case.model.tower.num_params * case.split.element
    if phase in ("encode", "generate", "evaluate"):
        num_prompts = case.cfg.eval.batch_size if phase == "evaluate" else case.work.num_prompts
        if case.model.tower is not None:
            yield "embeddings made here", num_prompts * _video_bytes(case) / case.trainer.world
        yield from need.items
        yield from (_encode_items(case) if phase == "encode" else _generate_items(case))
    else:
        yield from _learning_items(case, params, stage, phase)


def _learning_items(case: Case, params: StageParams, stage: int, phase: str) -> Iterator[tuple[str, float]]:
    backward = phase == "update"
    has_state = phase == OPTIMIZER_STEP or (backward and updates_beside_state(case.cfg))
    yield "gradients", params.trained * FP32
    if has_state:
        yield "optimizer", optimizer_bytes(case, params)
    yield from _trained_tower(case, backward, has_state)
    embeds = case.model.tower is not None and stage == 0
    if embeds:
        yield "embeddings fetched", _fetched_bytes(case)
    if phase != OPTIMIZER_STEP:
        if embeds:
            yield "embeddings in flight", _in_flight_bytes(case)
        yield from _passes(case, params, stage, backward)


def optimizer_bytes(case: Case, params: StageParams) -> float:
    """Over all data and context ranks."""
    return params.trained * _state_bytes(case) / case.trainer.optimizer_shards


def _state_bytes(case: Case) -> int:
    """A parameter: two moments and, where it is not fp32 itself, the fp32 copy."""
    return 2 * FP32 + (FP32 if case.split.element != FP32 else 0)


def _video_bytes(case: Case) -> float:
    """Embeddings of one video."""
    return case.work.video_tokens * case.model.shape.hidden_size * case.split.element


def _encode_items(case: Case) -> Iterator[tuple[str, float]]:
    tower, work = case.model.tower, case.work
    if tower is not None:
        frames = min(case.cfg.data.frames_per_chunk, work.num_frames)
        yield "decoded frames", min(DECODED_BYTES, _frame_bytes(case)) + _prefetched_frames(case)
        yield "tower's activations", tower.working_bytes(frames, work.size_hw, case.split.element)


def _generate_items(case: Case) -> Iterator[tuple[str, float]]:
    """The videos of a replica's prompts wait in host memory; those that the engine reads are in its encoder cache."""
    if case.model.tower is not None:
        yield "frames decoded ahead", _prefetched_frames(case)


def _frame_bytes(case: Case) -> float:
    """Of the resized frames of one video."""
    return 3.0 * case.work.num_frames * case.work.size_hw[0] * case.work.size_hw[1]


def _prefetched_frames(case: Case) -> float:
    """This rank's share of the frames of the next batch; on a GPU they stay there."""
    return min(case.cfg.data.prefetch_mib << 20, case.work.num_prompts * _frame_bytes(case) / case.trainer.world)


def _trained_tower(case: Case, backward: bool, has_state: bool) -> Iterator[tuple[str, float]]:
    """All of the vision encoder counts as trained; for it every rank is data parallel. Its backward follows the
    language model's, a chunk of frames at a time."""
    tower = case.model.tower
    if tower is None or case.cfg.model.freeze_vision:
        return
    yield "tower's gradients", tower.num_params * FP32
    if has_state:
        yield "tower's optimizer", tower.num_params * _state_bytes(case) / case.trainer.world
    if backward:
        frames = min(case.cfg.data.frames_per_chunk, case.work.num_frames)
        yield "tower's activations", tower.kept_bytes(frames, case.work.size_hw, case.split.element)


def _fetched_bytes(case: Case) -> float:
    """The first stage fetches the tokens of its own rows for all micro-batches."""
    videos = min(case.packing.bundles, case.work.num_prompts)
    wide = 1 if case.cfg.model.freeze_vision else FP32 / case.split.element  # what is trained is fetched in fp32
    return wide * videos * _video_bytes(case) / (case.trainer.context * case.trainer.tensor)


def _in_flight_bytes(case: Case) -> float:
    """Copies of those of the micro-batches that are computed."""
    work, trainer = case.work, case.trainer
    in_flight = chunks_in_flight(trainer, 0, case.packing.num_microbatches) / trainer.virtual
    rows = case.rows * work.video_tokens / work.prompt_tokens / trainer.tensor
    return in_flight * rows * case.model.shape.hidden_size * case.split.element


def _passes(case: Case, params: StageParams, stage: int, backward: bool) -> Iterator[tuple[str, float]]:
    shape, split, rows = case.model.shape, case.split, case.rows
    is_last = stage == case.trainer.pipeline - 1
    if not backward:
        working = act.scoring_working(shape, split, rows, case.largest)
    elif not is_last:
        working = act.backward_working(shape, split, rows, case.largest)
    else:
        num_layers = shape.num_layers // case.trainer.pipeline
        working = act.last_stage_working(shape, split, rows, case.largest, case.response_rows, num_layers)
    if backward:
        yield "activations", saved_bytes(case, stage)
    yield "working memory", working
    if is_last:
        logits = act.logits_working(shape, split, case.response_rows, params.largest, backward)
        yield "logits, above that", max(0.0, logits - working)


def saved_bytes(case: Case, stage: int) -> float:
    """What all micro-batches in flight keep on a stage for their backward."""
    num_microbatches = case.packing.num_microbatches
    return saved_by_stage(
        case.model.shape, case.split, case.trainer, stage, num_microbatches, case.rows, case.response_rows
    )


def saved_by_stage(
    shape: TransformerShape,
    split: act.ActivationSplit,
    trainer: Grid,
    stage: int,
    num_microbatches: int,
    rows: int,
    response_rows: int,
) -> float:
    chunks = chunks_in_flight(trainer, stage, num_microbatches)
    layers = shape.num_layers / (trainer.pipeline * trainer.virtual)
    saved = chunks * (layers * rows * act.layer_bytes(shape, split) + act.rotary_table(shape, split, rows))
    is_last = stage == trainer.pipeline - 1
    if trainer.pipeline > 1:  # outputs sent on, and the input and gradient that the schedule still refers to
        kept = 2 + (0 if is_last and trainer.virtual == 1 else chunks)
        saved += kept * rows * shape.hidden_size / split.tensor * split.element
    if is_last:
        saved += act.head_saved(shape, split, response_rows)
    if is_last and trainer.virtual == 1:  # else the fullest moment is one of other chunks
        saved += act.last_layer_bytes(shape, split, rows, response_rows) - rows * act.layer_bytes(shape, split)
    return saved


def host_bytes(case: Case, need: EngineNeed) -> dict[str, float]:
    """Main memory of one rank: offloaded optimizer state, the sleeping engine's weights, the embeddings of all media
    of its replica's prompts, the reference and, while it is swapped in, the policy."""
    params = max((case.params(stage) for stage in (0, case.trainer.pipeline - 1)), key=lambda p: p.total)
    host = {"offloaded optimizer": optimizer_bytes(case, params), "sleeping engine's weights": need.weights}
    if case.model.tower is not None:
        most = max(case.work.num_prompts, case.cfg.eval.batch_size if case.cfg.data.eval else 0)
        host["videos for the engine"] = -(-most // case.engine.data) * _video_bytes(case)
    if case.cfg.algorithm.kl_coef > 0:
        host["reference, and the policy meanwhile"] = 2.0 * params.total * case.split.element
    return host
