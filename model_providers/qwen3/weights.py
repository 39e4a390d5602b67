# SPDX-License-Identifier: Apache-2.0
"""Shape and weight table of Qwen2, Qwen2.5 and Qwen3 text models; Qwen3 also as a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import raise_all
from model_providers.decoder_weights import decoder_weight_map
from model_providers.shape import TransformerShape, rope_of, unsupported_settings
from model_providers.weight_map import WeightMap


def weight_map(shape: TransformerShape) -> WeightMap:
    return decoder_weight_map(shape)


def shape_of(config: Mapping[str, Any]) -> TransformerShape:
    """The shape from a checkpoint's config.json, as on the hub or as transformers 5 writes it."""
    raise_all(_problems(config), "model")
    is_qwen3 = config["model_type"] in ("qwen3", "qwen3_moe")
    is_moe = config["model_type"] == "qwen3_moe"
    head_dim = config.get("head_dim") or (128 if is_qwen3 else config["hidden_size"] // config["num_attention_heads"])
    return TransformerShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["moe_intermediate_size" if is_moe else "intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_groups=config["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        rms_eps=config["rms_norm_eps"],
        rope=rope_of(config, head_dim),
        qkv_bias=not is_qwen3,
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_positions=config["max_position_embeddings"],
        qk_norm=is_qwen3,
        num_experts=_num_experts(config) if is_moe else 0,
        experts_per_token=config["num_experts_per_tok"] if is_moe else 0,
        renormalized_routing=not is_moe or config.get("norm_topk_prob", False),
    )


def _num_experts(config: Mapping[str, Any]) -> int:
    """The hub's name for it, or the one that transformers 5 writes."""
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _problems(config: Mapping[str, Any]) -> list[str]:
    problems = unsupported_settings(config)
    if config.get("attention_bias"):
        problems.append("model.hf: attention_bias=true: not supported for Qwen3; use a checkpoint without")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        problems.append("model.hf: mlp_only_layers, decoder_sparse_step: every layer must have experts")
    return problems
