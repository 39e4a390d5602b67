# SPDX-License-Identifier: Apache-2.0
"""The smallest Qwen3 that every library here runs: for tests and for trying out a recipe on text."""

from __future__ import annotations

from typing import Any

HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes


def tiny(vocab_size: int) -> dict[str, Any]:
    """Arguments of transformers' Qwen3Config and Qwen2Config, without token ids: 2 layers of width 128.

    Initial weights are wide, so that a random model prefers some tokens to others.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
