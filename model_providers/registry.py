# SPDX-License-Identifier: Apache-2.0
"""Model families by the `model_type` of their config.json. To add one, write a provider package and name it here."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.protocols import ModelProvider
from model_providers.qwen2_5_vl.provider import Qwen2_5_VL
from model_providers.qwen3.provider import QwenText

PROVIDERS = {Qwen2_5_VL.model_type: Qwen2_5_VL, **dict.fromkeys(QwenText.model_types, QwenText)}


def open_provider(
    folder: str | Path, min_pixels: int = 100_352, max_pixels: int = 602_112, total_pixels: int = 0
) -> ModelProvider:
    """The provider of a Hugging Face checkpoint folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.hf={folder}: holds no config.json; give the folder of a Hugging Face checkpoint")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in PROVIDERS:
        known = ", ".join(sorted(PROVIDERS))
        raise ValueError(f"model.hf={folder}: model_type {model_type!r} has no provider; choose one of: {known}")
    return PROVIDERS[model_type](folder, min_pixels, max_pixels, total_pixels)
