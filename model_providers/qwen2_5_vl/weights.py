# SPDX-License-Identifier: Apache-2.0
"""Shape and weight table of Qwen2.5-VL's language model. The vision tower keeps its HF names and has no entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import raise_all
from model_providers.decoder_weights import decoder_weight_map
from model_providers.shape import TransformerShape, rope_of, unsupported_settings
from model_providers.weight_map import WeightMap


def weight_map(shape: TransformerShape) -> WeightMap:
    return decoder_weight_map(shape, engine_prefix="language_model.")


def shape_of(config: Mapping[str, Any]) -> TransformerShape:
    """The language model's shape from a checkpoint's config.json, flat (as on the hub) or with a `text_config`."""
    text = config.get("text_config") or config
    raise_all(_problems(text), "model")
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return TransformerShape(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_heads=heads,
        num_groups=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        rms_eps=text["rms_norm_eps"],
        rope=rope_of(text, head_dim),
        qkv_bias=True,
        tied_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        max_positions=text["max_position_embeddings"],
    )


def _problems(text: Mapping[str, Any]) -> list[str]:
    problems, rope = unsupported_settings(text), text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not rope.get("mrope_section"):
        problems.append("model.hf: mrope_section: missing in config.json; write down the sections of the positions")
    return problems
