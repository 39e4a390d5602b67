# SPDX-License-Identifier: Apache-2.0
"""Shape and weight table of each family by the `model_type` of its config.json, without torch: for planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from model_providers.qwen2_5_vl import weights as qwen2_5_vl
from model_providers.qwen3 import weights as qwen3
from model_providers.shape import TransformerShape
from model_providers.weight_map import WeightMap

ShapeOf = Callable[[Mapping[str, Any]], TransformerShape]
TableOf = Callable[[TransformerShape], WeightMap]

TABLES: dict[str, tuple[ShapeOf, TableOf]] = {
    "qwen2_5_vl": (qwen2_5_vl.shape_of, qwen2_5_vl.weight_map),
    "qwen2": (qwen3.shape_of, qwen3.weight_map),
    "qwen3": (qwen3.shape_of, qwen3.weight_map),
    "qwen3_moe": (qwen3.shape_of, qwen3.weight_map),
}
