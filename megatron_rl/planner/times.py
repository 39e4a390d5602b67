# SPDX-License-Identifier: Apache-2.0
"""Predicted seconds of every phase. Predictions: FLOPs and bytes over what a GPU can do, times assumed efficiencies.

Nothing here was measured on a GPU. Not counted: video decoding, weights that wait in host memory, latencies. To compare
with: EasyR1 publishes 14 to 19 % MFU for Qwen2.5-VL-7B on 8 x H100 (its assets/baselines.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rl.planner.activations import widths
from megatron_rl.planner.engine import engine_need, kv_bytes
from megatron_rl.planner.flops import (
    BACKWARD_ATTENTION,
    BACKWARD_LINEAR,
    attention_flops,
    head_flops,
    linear_flops,
    recomputed,
    step_flops,
    trained_forward,
)
from megatron_rl.planner.gpus import GPUS_PER_NODE, Gpu
from megatron_rl.planner.layout import BYTES
from megatron_rl.planner.memory import Case
from model_providers.shape import TransformerShape

SMALL_MATRIX = 256  # columns below which a sharded matrix loses efficiency


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Assumed parts of the published peaks: linears and attention of the trainer, the engine's prefill, the tower; HBM
    while decoding; links in collectives."""

    linear: float = 0.55
    attention: float = 0.45
    prefill: float = 0.50
    tower: float = 0.35
    hbm: float = 0.60
    link: float = 0.70


ASSUMED = Efficiency()


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step, by phase, in its order."""

    phases: dict[str, float]

    @property
    def step(self) -> float:
        return sum(self.phases.values())


def predict(case: Case, assumed: Efficiency = ASSUMED) -> Times:
    flops, trainer, gpu, cfg = step_flops(case), case.trainer, case.gpu, case.cfg
    phases = {"sync": _sync(case, assumed)}
    if case.model.tower is not None:
        phases["encode"] = flops.encode / (trainer.world * gpu.peak * assumed.tower)
    phases["generate: prompts"] = _prefill(case, assumed)
    phases["generate: responses"] = _decode(case, assumed)
    one_pass = _pass(case, assumed, backward=False)
    if cfg.train.updates_per_step > 1:
        phases["old log-probs"] = one_pass
    if cfg.algorithm.kl_coef > 0:
        phases["reference"] = one_pass
    phases["update"] = _pass(case, assumed, backward=True) + _optimizer(case, assumed)
    if not cfg.model.freeze_vision and "encode" in phases:  # encoded once more, and backwards
        phases["update"] += (1 + BACKWARD_LINEAR) * phases["encode"]
    return Times(phases)


def link(gpu: Gpu, num_ranks: int, stride: int = 1) -> float:
    """Bytes per second between ranks that stand `stride` apart: NVLink while all of them share a node."""
    return gpu.nvlink if num_ranks * stride <= GPUS_PER_NODE else gpu.network


def _sync(case: Case, assumed: Efficiency) -> float:
    """At most the engine's shard arrives; see plan_sync for the bytes of a given pair of layouts."""
    need = engine_need(case.cfg, case.model, case.gpu, case.work)
    return need.weights / (link(case.gpu, case.trainer.world) * assumed.link)


def _prefill(case: Case, assumed: Efficiency) -> float:
    """Every prompt once: its samples find it in the prefix cache."""
    shape, work, tensor = case.model.shape, case.work, case.engine.tensor
    flops = work.prompt_tokens * linear_flops(shape) + attention_flops(shape, work.prompt_tokens**2 / 2)
    prompts = -(-work.num_prompts // case.engine.data)
    seconds = flops / (tensor * case.gpu.peak * assumed.prefill)
    return prompts * (seconds + _all_reduces(case, shape, work.prompt_tokens, tensor, assumed))


def _decode(case: Case, assumed: Efficiency) -> float:
    """Bound by memory: a step reads the weights once and the keys and values of every sequence."""
    shape, work, engine = case.model.shape, case.work, case.engine
    need = engine_need(case.cfg, case.model, case.gpu, work)
    num_sequences = -(-work.num_prompts // engine.data) * work.num_samples
    together = max(1, min(need.num_sequences, num_sequences))
    context = work.prompt_tokens + work.response_tokens / 2
    read = need.weights + together * context * kv_bytes(shape, engine.tensor, BYTES[case.cfg.model.dtype])
    compute = together * (linear_flops(shape) + head_flops(shape, 1)) / (engine.tensor * case.gpu.peak)
    a_step = max(read / (case.gpu.hbm * assumed.hbm), compute / assumed.prefill)
    a_step += _all_reduces(case, shape, together, engine.tensor, assumed)
    return math.ceil(num_sequences / together) * work.response_tokens * a_step


def _all_reduces(case: Case, shape: TransformerShape, tokens: float, tensor: int, assumed: Efficiency) -> float:
    """Two of a token's hidden state in every layer."""
    if tensor == 1:
        return 0.0
    sent = 2 * 2 * (tensor - 1) / tensor * shape.num_layers * tokens * shape.hidden_size * case.split.element
    return sent / (link(case.gpu, tensor) * assumed.link)


# ------------------------------------------------------------------------------------------------------------- training


def _pass(case: Case, assumed: Efficiency, backward: bool) -> float:
    """All micro-batches of a step through the pipeline, the last stage's logits included."""
    shape, work, trainer = case.model.shape, case.work, case.trainer
    linear, attention = trained_forward(case)
    head = head_flops(shape, work.num_prompts * work.num_samples * work.response_tokens)
    if backward:
        again, attention_again = recomputed(shape, case.cfg.model.recompute)
        linear *= 1 + BACKWARD_LINEAR + again
        attention *= 1 + BACKWARD_ATTENTION + attention_again
        head *= 2 + BACKWARD_LINEAR
    efficiency = assumed.linear * _shrunk(case)
    layers = linear / efficiency + attention / assumed.attention
    here = (layers / trainer.pipeline + head / efficiency) / (case.gpu.peak * trainer.data * trainer.context)
    seconds = here / trainer.tensor * _imbalance(case) + _communication(case, assumed, backward)
    chunks = case.packing.num_microbatches * trainer.virtual
    return seconds * (chunks + trainer.pipeline - 1) / chunks


def _shrunk(case: Case) -> float:
    """Narrow shards of a matrix compute slower: assumed in proportion to the width of the smallest one."""
    at = widths(case.model.shape, case.trainer.tensor)
    return min(1.0, (at.kv + at.q) / SMALL_MATRIX, at.ffn / SMALL_MATRIX)


def _imbalance(case: Case) -> float:
    """Tokens of the busiest data parallel rank over the average."""
    work, trainer = case.work, case.trainer
    bundles = work.num_prompts * work.num_samples / case.packing.responses_a_bundle
    in_bundle = work.prompt_tokens + case.packing.responses_a_bundle * work.response_tokens
    average = bundles * in_bundle / trainer.data / case.cfg.train.updates_per_step
    return max(1.0, case.packing.rows / average)


def _communication(case: Case, assumed: Efficiency, backward: bool) -> float:
    """Of one stage over a step. Tensor parallel: two gathers and two scatters of the rows in a layer, twice as many
    and two gathers again in the backward. Context parallel: keys and values, again in the backward, with their fp32
    gradients; behind computation in a ring. Each between neighbours: rows * (ranks - 1) / ranks."""
    shape, trainer, split = case.model.shape, case.trainer, case.split
    updates = case.cfg.train.updates_per_step
    rows = case.packing.rows * updates  # of all context parallel ranks
    layers = shape.num_layers / trainer.pipeline
    again = float(backward and split.recompute == "full")
    seconds = 0.0
    if trainer.tensor > 1:
        share = (trainer.tensor - 1) / trainer.tensor
        times = 4 * (1 + again) + (6 if backward else 0)
        sent = times * layers * share * rows / trainer.context * shape.hidden_size * split.element
        seconds += sent / (link(case.gpu, trainer.tensor) * assumed.link)
    if trainer.context > 1 and split.context_comm != "p2p":
        at, share = widths(shape, trainer.tensor), (trainer.context - 1) / trainer.context
        width = (at.q * 2 + 2 * at.kv) / trainer.context if split.context_comm == "a2a" else 2 * at.kv
        each = split.element * (1 + again) + (split.element + 4 if backward else 0)
        speed = link(case.gpu, trainer.context, trainer.tensor)
        seconds += layers * share * rows * width * each / (speed * assumed.link)
    return seconds


def _optimizer(case: Case, assumed: Efficiency) -> float:
    """Gradients scattered in fp32, parameters gathered; twelve and more bytes a parameter read and written."""
    trainer, trained = case.trainer, case.params(0).trained
    shards = trainer.optimizer_shards
    moved = (4 + case.split.element) * trained * (shards - 1) / shards
    stride = trainer.tensor
    touched = 2 * 16 * trained / shards / (case.gpu.hbm * assumed.hbm)
    seconds = moved / (link(case.gpu, shards, stride) * assumed.link) + touched
    return seconds * case.cfg.train.updates_per_step
