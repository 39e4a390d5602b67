# SPDX-License-Identifier: Apache-2.0
"""FLOPs of every phase of a step, all ranks together, as they are executed (recomputation included).

A weight costs 2 FLOPs a token; a pair of tokens that attend to each other 4 * heads * head size in every layer. A
backward pass is two forward passes in the linears, two and a half in flash attention (which computes the scores again:
Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.planner.memory import Case, passes_without_gradients
from model_providers.shape import TransformerShape

BACKWARD_LINEAR, BACKWARD_ATTENTION = 2.0, 2.5


@dataclass(frozen=True, slots=True)
class Flops:
    """One step. `log_probs` is of one pass; `num_passes` of them are made without gradients (old, reference)."""

    encode: float
    prefill: float
    decode: float
    log_probs: float
    num_passes: int
    update: float

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.decode + self.num_passes * self.log_probs + self.update


def linear_flops(shape: TransformerShape) -> float:
    """A token's forward pass through the linears of all layers."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    return 2.0 * shape.num_layers * (shape.hidden_size * (2 * q + 2 * kv) + feed_forward_weights(shape))


def recomputed(shape: TransformerShape, recompute: str) -> tuple[float, float]:
    """Parts of the forward pass through the linears and through attention that the backward makes again."""
    if recompute == "selective":
        return feed_forward_weights(shape) / (linear_flops(shape) / 2 / shape.num_layers), 0.0
    return (1.0, 1.0) if recompute == "full" else (0.0, 0.0)


def feed_forward_weights(shape: TransformerShape) -> float:
    """Of a layer, as far as one token meets them."""
    experts = shape.experts_per_token if shape.num_experts else 1
    return 3.0 * shape.hidden_size * shape.ffn_hidden_size * experts + shape.hidden_size * shape.num_experts


def attention_flops(shape: TransformerShape, pairs: float) -> float:
    """The forward pass of `pairs` in all layers."""
    return 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def causal_pairs(prompt: float, responses: float, num_responses: float) -> float:
    """Of a prompt computed once and its responses, each of which attends to it and to itself."""
    return prompt**2 / 2 + num_responses * (prompt * responses + responses**2 / 2)


def head_flops(shape: TransformerShape, tokens: float) -> float:
    return 2.0 * shape.hidden_size * shape.vocab_size * tokens


def step_flops(case: Case) -> Flops:
    shape, work = case.model.shape, case.work
    num_sequences = work.num_prompts * work.num_samples
    responses = num_sequences * work.response_tokens
    linear, attention = trained_forward(case)
    head = head_flops(shape, responses)
    again, attention_again = recomputed(shape, case.cfg.model.recompute)
    update = linear * (1 + BACKWARD_LINEAR + again) + head * (2 + BACKWARD_LINEAR)
    update += attention * (1 + BACKWARD_ATTENTION + attention_again)
    prefill = work.prompt_tokens * linear_flops(shape) + attention_flops(shape, work.prompt_tokens**2 / 2)
    decoded = work.prompt_tokens * work.response_tokens + work.response_tokens**2 / 2
    encode = work.num_prompts * case.model.tower.flops(work.num_frames, work.size_hw) if case.model.tower else 0.0
    if not case.cfg.model.freeze_vision:  # encoded once more, and backwards
        update += (1 + BACKWARD_LINEAR) * encode
    return Flops(
        encode=encode,
        prefill=work.num_prompts * prefill,
        decode=responses * linear_flops(shape) + attention_flops(shape, num_sequences * decoded) + head,
        log_probs=linear + attention + head,
        num_passes=passes_without_gradients(case.cfg),
        update=update,
    )


def trained_forward(case: Case) -> tuple[float, float]:
    """(linears, attention) of one pass over all that a step trains on. A shared prompt counts once a bundle, and in the
    last layer for little: its keys and values are made, and nothing else is computed for it."""
    work, packing, shape = case.work, case.packing, case.model.shape
    bundles = work.num_prompts * work.num_samples / packing.responses_a_bundle
    predicting = packing.responses_a_bundle * work.response_tokens
    pairs = causal_pairs(work.prompt_tokens, work.response_tokens, packing.responses_a_bundle)
    linear = (work.prompt_tokens + predicting) * linear_flops(shape) - work.prompt_tokens * idle_flops(shape)
    idle_pairs = work.prompt_tokens**2 / 2 / shape.num_layers
    return bundles * linear, bundles * attention_flops(shape, pairs - idle_pairs)


def idle_flops(shape: TransformerShape) -> float:
    """What a prompt's token is spared in the last layer: output projection and feed-forward."""
    return 2.0 * (shape.hidden_size * shape.num_heads * shape.head_dim + feed_forward_weights(shape))
