# SPDX-License-Identifier: Apache-2.0
"""Numbers of well-known models, as published in their config.json, so that planning needs no download.

Qwen2.5 and Qwen2.5-VL: config.json of Qwen/<name>-Instruct on the Hugging Face hub.
LongVILA-7B (Efficient-Large-Model): a Qwen2-7B language model behind google/siglip-so400m-patch14-448, two linears that
merge 2 x 2 patches (`mlp_downsample`), and a newline token after each frame: 257 tokens a frame, as in Long-RL's
`longvila_7b_video_grpo.sh`. It has no provider here: it can be planned, not run.
"""

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


def _qwen_vision(ffn: int, out: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": ffn,
        "num_heads": 16,
        "out_hidden_size": out,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


_SIGLIP_448 = {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "tokens_after_frame": 1,
    "out_hidden_size": 3584,
}
_7B = _sizes(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4)
_32B = _sizes(layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8)
_72B = _sizes(layers=80, hidden=8192, ffn=29568, heads=64, kv_heads=8)

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": {**_TEXT, **_7B},
    "Qwen2.5-VL-3B": {
        **_VL,
        **_sizes(layers=36, hidden=2048, ffn=11008, heads=16, kv_heads=2),
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": _qwen_vision(3420, 2048),
    },
    "Qwen2.5-VL-7B": {**_VL, **_7B, "vision_config": _qwen_vision(3420, 3584)},
    "Qwen2.5-VL-32B": {**_VL, **_32B, "vision_config": _qwen_vision(3456, 5120)},
    "Qwen2.5-VL-72B": {**_VL, **_72B, "vision_config": _qwen_vision(3456, 8192)},
    "LongVILA-7B": {**_TEXT, **_7B, "vision_config": _SIGLIP_448},
}
