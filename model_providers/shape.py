# SPDX-License-Identifier: Apache-2.0
"""The numbers of a decoder-only transformer that Megatron-core needs, whatever the family. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: frequencies of long wavelengths are divided by `factor`, those of short ones are kept, those between
    are interpolated. `original_positions` is the context length of pretraining."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn fewer than `beta_slow` times within the `original_positions` of
    pretraining are divided by `factor`, those that turn more than `beta_fast` times are kept, those between are
    interpolated. `attention_factor` multiplies cosines and sines. `truncate`: the two bounds are whole dimensions."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary position embedding: frequency i of dim / 2 is theta ** (-2 i / dim), before scaling.

    Example: RopeSettings(theta=1e6, dim=128, sections=(16, 24, 24)) is Qwen2.5-VL's.
    """

    theta: float
    dim: int
    """The first so many columns of a head are rotated; the others are not (partial rotary)."""
    sections: tuple[int, int, int] | None = None
    """m-RoPE: how many frequencies read the time, height and width of a position. None: all read its first row."""
    interleaved: bool = False
    """With sections: time, height, width in turn (Qwen3-VL), not one section behind the other (Qwen2-VL)."""
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


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
    rope: RopeSettings
    qkv_bias: bool
    tied_embeddings: bool
    max_positions: int
    qk_norm: bool = False
    num_experts: int = 0
    """0: a dense feed-forward network of ffn_hidden_size; otherwise that is the size of one expert."""
    experts_per_token: int = 0
    renormalized_routing: bool = True
    """The weights of the chosen experts sum to one."""
    deepstack_levels: int = 0
    """DeepStack (arXiv 2406.04334): each of the first so many layers adds media features of its own to the rows of
    media. The embedding of a media token is then [hidden_size * (1 + deepstack_levels)] wide."""

    def __post_init__(self) -> None:
        if self.deepstack_levels >= self.num_layers:  # the last layer computes no rows of media
            raise ValueError(
                f"model.hf: {self.deepstack_levels} levels of media features for {self.num_layers} layers: the last "
                "layer takes none; use a checkpoint with fewer levels"
            )


# ----------------------------------------------------------------------------------------------- reading config.json

_SCALING_SETTINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""What each kind of scaling must say."""


def rope_of(text: Mapping[str, Any], head_dim: int) -> RopeSettings:
    """From the language model's part of config.json, as on the hub (`rope_theta`, `rope_scaling`) or as transformers 5
    writes it (`rope_parameters`). What `unsupported_settings` lists must not occur in it."""
    rope = _rope(text)
    dim, sections = _rotary_dim(text, head_dim), rope.get("mrope_section")
    if sections and (len(sections) != 3 or 2 * sum(sections) != dim):
        raise ValueError(
            f"model.hf: mrope_section={sections}: three numbers must sum to {dim // 2}, half of the rotated columns of "
            "a head; correct config.json"
        )
    return RopeSettings(
        theta=float(_setting(text, "rope_theta")),
        dim=dim,
        sections=(sections[0], sections[1], sections[2]) if sections else None,
        interleaved=bool(rope.get("mrope_interleaved", False)),
        scaling=_scaling(rope),
    )


def unsupported_settings(text: Mapping[str, Any]) -> list[str]:
    """Settings of config.json that the engine would apply and the trainer does not have."""
    problems = _rope_problems(text)
    if text.get("use_sliding_window"):
        problems.append("model.hf: use_sliding_window=true: every layer attends to all tokens; set it to false")
    return problems


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    """ "mrope" is an older name for no scaling."""
    name = rope.get("rope_type") or rope.get("type") or "default"
    return "default" if name == "mrope" and "mrope_section" in rope else name


def _setting(text: Mapping[str, Any], name: str) -> Any:
    """A rotary setting, which may stand in one of two places."""
    value = _rope(text).get(name)
    return text.get(name) if value is None else value


def _rotary_dim(text: Mapping[str, Any], head_dim: int) -> int:
    factor = _setting(text, "partial_rotary_factor")
    return int(head_dim * (1.0 if factor is None else factor))


def _rope_problems(text: Mapping[str, Any]) -> list[str]:
    rope = _rope(text)
    if any(isinstance(value, Mapping) for value in rope.values()):
        return ["model.hf: rope_parameters: one set for each kind of layer is not supported; use another checkpoint"]
    kind, problems = _rope_type(rope), []
    if not _setting(text, "rope_theta"):
        problems.append("model.hf: rope_theta: missing in config.json; write down the base of the rotary frequencies")
    if kind != "default" and kind not in _SCALING_SETTINGS:
        known = ", ".join(["default", *_SCALING_SETTINGS])
        problems.append(f"model.hf: rope_type={kind}: this rotary scaling is not supported; use one of {known}")
    missing = [name for name in _SCALING_SETTINGS.get(kind, ()) if not rope.get(name)]
    if missing:
        problems.append(f"model.hf: rope_type={kind}: {', '.join(missing)} missing in config.json; add what is missing")
    if rope.get("mrope_section") and kind not in ("default", "yarn"):
        problems.append(f"model.hf: rope_type={kind}: the engine drops mrope_section with this scaling; use yarn")
    return problems


def _scaling(rope: Mapping[str, Any]) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    kind = _rope_type(rope)
    if kind == "linear":
        return LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_positions=int(rope["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return YarnScaling(
            factor=float(rope["factor"]),
            original_positions=int(rope["original_max_position_embeddings"]),
            attention_factor=_attention_factor(rope),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
        )
    return None


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """As given, or YaRN's: 0.1 ln(factor) + 1, of which DeepSeek takes a ratio."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(mscale) / of(mscale_all) if mscale and mscale_all else of(1.0)
