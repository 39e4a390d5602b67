# SPDX-License-Identifier: Apache-2.0
"""The numbers of a decoder-only transformer that Megatron-core needs, whatever the family. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """The numbers of a decoder-only transformer that Megatron-core needs, whatever the family."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    qkv_bias: bool
    tied_embeddings: bool
    max_positions: int
    qk_norm: bool = False
    num_experts: int = 0
    """0: a dense feed-forward network of ffn_hidden_size; otherwise that is the size of one expert."""
    experts_per_token: int = 0
    renormalized_routing: bool = True
    """The weights of the chosen experts sum to one."""


def unsupported_settings(text: Mapping[str, Any], rope_types: tuple[str, ...] = ("default",)) -> list[str]:
    """Settings of config.json that the engine would apply and the trainer does not have."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    problems = []
    if rope_type not in rope_types:
        problems.append(f"model.hf: rope_type={rope_type}: rotary scaling is not supported; remove it from config.json")
    if text.get("use_sliding_window"):
        problems.append("model.hf: use_sliding_window=true: every layer attends to all tokens; set it to false")
    return problems
