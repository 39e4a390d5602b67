# SPDX-License-Identifier: Apache-2.0
"""Shape and weight table of dense Qwen2, Qwen2.5 and Qwen3 text models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import raise_all
from model_providers.dense import dense_weight_map
from model_providers.shape import TransformerShape
from model_providers.weight_map import WeightMap


def weight_map(shape: TransformerShape) -> WeightMap:
    return dense_weight_map(shape)


def shape_of(config: Mapping[str, Any]) -> TransformerShape:
    """The shape from a checkpoint's config.json, as on the hub or as transformers 5 writes it."""
    raise_all(_problems(config), "model")
    is_qwen3 = config["model_type"] == "qwen3"
    head_dim = config.get("head_dim") or (128 if is_qwen3 else config["hidden_size"] // config["num_attention_heads"])
    return TransformerShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_groups=config["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        rms_eps=config["rms_norm_eps"],
        rope_theta=_rope(config).get("rope_theta") or config["rope_theta"],
        mrope_section=(head_dim // 2, 0, 0),  # all three rows of a text's positions are equal: one is read
        qkv_bias=not is_qwen3,
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_positions=config["max_position_embeddings"],
        qk_norm=is_qwen3,
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _problems(config: Mapping[str, Any]) -> list[str]:
    """Settings of config.json that would change the forward pass and that the trainer does not have."""
    problems = []
    rope_type = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    if rope_type != "default":
        problems.append(f"model.hf: rope_type={rope_type}: rotary scaling is not supported; remove it from config.json")
    if config.get("use_sliding_window"):
        problems.append("model.hf: use_sliding_window=true: every layer attends to all tokens; set it to false")
    if config.get("attention_bias"):
        problems.append("model.hf: attention_bias=true: not supported for Qwen3; use a checkpoint without")
    return problems
