# SPDX-License-Identifier: Apache-2.0
"""The model families by the `model_type` of their config.json, and what every part of the system asks of one.

To add a family, write its package and name it in FAMILIES. Imports no torch: what needs it is named "module:function"
and imported when it is first used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.types import EngineModel, MediaKind
from model_providers.qwen2_5_vl import weights as qwen2_5_vl
from model_providers.qwen3 import weights as qwen3
from model_providers.shape import TransformerShape
from model_providers.weight_map import WeightMap

if TYPE_CHECKING:
    from torch import device

    from megatron_rl.protocols import MediaEncoder, MediaSpecs, PositionRule
    from megatron_rl.runtime.device import Backend
    from megatron_rl.types import VisionPart
    from model_providers.hf_checkpoint import HfCheckpoint

Config = Mapping[str, Any]
"""What `read_config` returns."""

SUBFOLDERS = {"llm": "text_config", "vision_tower": "vision_config", "mm_projector": "projector_config"}
"""Folders of a checkpoint in several folders, and the section of the configuration that each one's config.json is."""


@dataclass(frozen=True, slots=True)
class PixelBounds:
    """Area of a frame after resizing, and (0 = unbounded) of all frames of a video together."""

    least: int = 100_352
    most: int = 602_112
    total: int = 0


SpecsOf = Callable[[Config, Path, PixelBounds], "MediaSpecs"]
PositionsOf = Callable[[Config], "PositionRule"]
BuildEncoder = Callable[
    [Config, "HfCheckpoint", "MediaSpecs", "Backend", "device", "frozenset[VisionPart]"], "MediaEncoder"
]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    shape_of raises KeyError for a config.json that lacks something, ValueError for one that is not supported.
    specs: "module:function" (SpecsOf), empty for a family of text only.
    encoders: "module:function" (BuildEncoder) by kind of media; kinds with the same one share an encoder.
    positions: "module:function" (PositionsOf), empty where all tokens count up.
    """

    name: str
    shape_of: Callable[[Config], TransformerShape]
    weights_of: Callable[[TransformerShape], WeightMap]
    specs: str = ""
    encoders: Mapping[MediaKind, str] = field(default_factory=dict)
    positions: str = ""
    engine: EngineModel = field(default_factory=EngineModel)


_QWEN_TEXT = Family("Qwen text", qwen3.shape_of, qwen3.weight_map)
_QWEN2_5_VL = Family(
    "Qwen2.5-VL",
    qwen2_5_vl.shape_of,
    qwen2_5_vl.weight_map,
    specs="model_providers.qwen2_5_vl.vision:specs_of",
    encoders=dict.fromkeys(("video", "image"), "model_providers.qwen2_5_vl.vision:build_encoder"),
    positions="model_providers.qwen2_5_vl.positions:positions_of",
    engine=EngineModel(positions="mrope"),
)

FAMILIES: dict[str, Family] = {
    "qwen2": _QWEN_TEXT,
    "qwen2_5_vl": _QWEN2_5_VL,
    "qwen3": _QWEN_TEXT,
    "qwen3_moe": _QWEN_TEXT,
}


def read_config(checkpoint: str | Path, setting: str = "model.hf") -> Config:
    """The configuration of a checkpoint, from its folder or its config.json: flat, as it stands; sections of a
    `thinker_config` at the top; each config.json of a checkpoint in several folders as a section (SUBFOLDERS).

    `setting` names the checkpoint in errors. Raises ValueError.
    """
    path = Path(checkpoint)
    folder = path.parent if path.is_file() else path
    config = _read(path if path.is_file() else folder / "config.json", folder, setting)
    config |= config.get("thinker_config", {}) | {"model_type": config.get("model_type")}
    for name, section in SUBFOLDERS.items():
        if (folder / name / "config.json").is_file():
            config[section] = _read(folder / name / "config.json", folder, setting)
    return config


def _read(path: Path, folder: Path, setting: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{setting}={folder}: has no {path.relative_to(folder)}; give the folder of a Hugging Face checkpoint"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{setting}={folder}: {path.name} is not readable ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{setting}={folder}: {path.name} is not a JSON object; download it again")
    return config


def text_section(config: Config) -> Config:
    """The part of a configuration that describes the language model."""
    section: Config = config.get("text_config") or config
    return section


def family_of(config: Config, name: str | Path, setting: str = "model.hf") -> Family:
    """The family of a configuration; `name` is what the user gave for `setting`. Raises ValueError."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{setting}={name}: no provider for model_type={model_type}; one of {known}")
    return FAMILIES[model_type]


def shape_and_weights(
    config: Config, name: str | Path, setting: str = "model.hf"
) -> tuple[TransformerShape, WeightMap]:
    """Shape and weight table of a configuration, as `family_of`. Raises ValueError."""
    family = family_of(config, name, setting)
    try:
        shape = family.shape_of(config)
    except KeyError as error:
        raise ValueError(f"{setting}={name}: config.json has no {error.args[0]!r}; give a complete one") from error
    return shape, family.weights_of(shape)


def imported(reference: str) -> Any:
    """What "module:function" names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
