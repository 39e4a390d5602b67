# SPDX-License-Identifier: Apache-2.0
"""What vLLM takes on one rank while it is awake, in bytes, and whether its KV cache can hold what it must.

With `rollout.gpu_memory_utilization` vLLM takes that part of the GPU for weights, working memory and KV cache together.
The encoder's cache comes on top: the engine has no encoder, so vLLM does not count the embeddings it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import RlConfig
from megatron_rl.planner.gpus import GIB, Gpu
from megatron_rl.planner.layout import BYTES
from megatron_rl.planner.model import PlannedModel, engine_params
from megatron_rl.planner.workload import Workload
from megatron_rl.rollout.kv_cache import kv_bytes
from megatron_rl.runtime.chunks import GPU_PREFILL_TOKENS
from model_providers.shape import TransformerShape

CUDA_GRAPHS = GIB  # assumed, unless rollout.enforce_eager


@dataclass(frozen=True, slots=True)
class EngineNeed:
    """`kv_tokens` fit into the KV cache of one replica; `num_sequences` are then decoded together."""

    weights: float
    working: float
    kv_cache: float
    encoder_cache: float
    kv_tokens: int
    num_sequences: int
    problems: tuple[str, ...]

    @property
    def items(self) -> tuple[tuple[str, float], ...]:
        return (
            ("vLLM weights", self.weights),
            ("vLLM working memory", self.working),
            ("KV cache", self.kv_cache),
            ("encoder cache", self.encoder_cache),
        )


def engine_need(cfg: RlConfig, model: PlannedModel, gpu: Gpu, work: Workload) -> EngineNeed:
    rollout, shape = cfg.rollout, model.shape
    element, tensor = BYTES[cfg.model.dtype], rollout.tensor
    weights = float(engine_params(model, tensor) * element)
    working = _working(cfg, shape, element)
    if rollout.kv_cache_gib > 0:
        kv_cache = rollout.kv_cache_gib * GIB
    else:
        kv_cache = max(0.0, rollout.gpu_memory_utilization * gpu.memory - weights - working)
    per_token = kv_bytes(shape, tensor, element)
    kv_tokens = int(kv_cache // per_token)
    encoder_cache = max(cfg.max_model_len, _batched_tokens(cfg)) * shape.hidden_size * element if model.tower else 0
    return EngineNeed(
        weights=weights,
        working=working,
        kv_cache=kv_cache,
        encoder_cache=float(encoder_cache),
        kv_tokens=kv_tokens,
        num_sequences=_together(cfg, work, kv_tokens),
        problems=tuple(_problems(cfg, kv_tokens, per_token)),
    )


def _batched_tokens(cfg: RlConfig) -> int:
    return max(cfg.rollout.max_num_seqs, GPU_PREFILL_TOKENS)


def _working(cfg: RlConfig, shape: TransformerShape, element: int) -> float:
    """Of one forward pass over a chunk of a prompt (residuals, feed-forward), the logits of all sequences in fp32 twice
    (whole vocabulary, for sampling), and CUDA graphs."""
    times = shape.experts_per_token if shape.num_experts else 1
    per_token = element * (4 * shape.hidden_size + 3 * times * shape.ffn_hidden_size / cfg.rollout.tensor)
    logits = 2 * 4.0 * cfg.rollout.max_num_seqs * shape.vocab_size
    return _batched_tokens(cfg) * per_token + logits + (0 if cfg.rollout.enforce_eager else CUDA_GRAPHS)


def _together(cfg: RlConfig, work: Workload, kv_tokens: int) -> int:
    """Sequences that the cache holds at once; the samples of a prompt share its part of the cache."""
    groups, rest = divmod(kv_tokens, work.group_tokens)
    more = max(0, (rest - work.prompt_tokens) // work.response_tokens)
    return min(cfg.rollout.max_num_seqs, groups * work.num_samples + more)


def _problems(cfg: RlConfig, kv_tokens: int, per_token: int) -> list[str]:
    if kv_tokens >= cfg.max_model_len:
        return []
    rollout = cfg.rollout
    if rollout.kv_cache_gib > 0:
        setting = f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}"
    else:
        setting = f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    need = cfg.max_model_len * per_token / GIB
    return [
        f"{setting}: the KV cache holds {kv_tokens:,} tokens and one sequence may have {cfg.max_model_len:,} "
        f"({need:.1f} GiB a rank), which vLLM refuses; raise it, or rollout.tensor"
    ]
