# SPDX-License-Identifier: Apache-2.0
"""The smallest Qwen2.5-VL that every library here runs: for the quick start, tests, and trying out a recipe."""

from __future__ import annotations

from typing import Any

HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
NUM_HEADS, NUM_KV_HEADS = 4, 2


def tiny(vocab_size: int) -> dict[str, Any]:
    """Arguments of transformers' Qwen2_5_VLConfig, without token ids: 2 layers of width 128, a vision encoder of
    width 64.

    Initial weights are wide, so that a random model prefers some tokens to others.
    """
    hidden = HEAD_DIM * NUM_HEADS
    text = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        # frequencies given to time, height and width; they sum to HEAD_DIM / 2
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "initializer_range": 0.2,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
