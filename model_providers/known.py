# SPDX-License-Identifier: Apache-2.0
"""Numbers of well-known models, as published in their config.json, so that planning needs no download."""

from __future__ import annotations

from typing import Any

_QWEN2_5: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 152064, "tie_word_embeddings": False}
_TEXT = {**_QWEN2_5, "model_type": "qwen2", "max_position_embeddings": 131072}
_VL = {
    **_QWEN2_5,
    "model_type": "qwen2_5_vl",
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_7B = _sizes(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4)

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": {**_TEXT, **_7B},
    "Qwen2.5-VL-3B": {
        **_VL,
        **_sizes(layers=36, hidden=2048, ffn=11008, heads=16, kv_heads=2),
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {**_VL, **_7B},
    "Qwen2.5-VL-32B": {**_VL, **_sizes(layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8)},
    "Qwen2.5-VL-72B": {**_VL, **_sizes(layers=80, hidden=8192, ffn=29568, heads=64, kv_heads=8)},
}
