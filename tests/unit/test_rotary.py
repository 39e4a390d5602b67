# SPDX-License-Identifier: Apache-2.0
"""Rotary angles against transformers' and Megatron-core's own modules; what config.json says about them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.runtime.device import choose_backend
from model_providers.rotary import Rotary, inverse_frequencies, set_attention_factor
from model_providers.shape import RopeSettings, YarnScaling, rope_of, unsupported_settings

pytestmark = pytest.mark.usefixtures("heavy_imports")

HEAD_DIM = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SETTINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 10_000.5},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3 | {"original_max_position_embeddings": 64}},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", **YARN, "attention_factor": 0.7},
    {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", **YARN | {"original_max_position_embeddings": 64}, "rope_theta": 1e6},
]


def _positions(num_rows: int = 500) -> Tensor:
    """[3, 1, T], each row its own."""
    return torch.randint(0, 100_000, (3, 1, num_rows), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_frequencies_are_those_of_transformers(settings: dict[str, Any]) -> None:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = {"max_position_embeddings": 1 << 17, "rope_parameters": {"rope_theta": 1e4} | settings}
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4}
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**sizes, **config))
    rope = rope_of(config, HEAD_DIM)
    assert unsupported_settings(config) == []
    assert torch.equal(inverse_frequencies(rope), theirs.inv_freq)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    cos, sin = theirs(torch.zeros(1), _positions()[0])
    angles = Rotary(rope)(_positions())[:, 0, 0]
    torch.testing.assert_close(angles.cos() * factor, cos[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(angles.sin() * factor, sin[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("sections", [(8, 12, 12), (32, 0, 0)])
@pytest.mark.parametrize("theta", [10_000, 1_000_000])
def test_angles_are_those_of_megatron_core(theta: int, sections: tuple[int, int, int]) -> None:
    with choose_backend("cpu", "float32").mcore_scope():
        theirs = MultimodalRotaryEmbedding(HEAD_DIM, 1.0, rotary_base=theta)(_positions(), list(sections))
    ours = Rotary(RopeSettings(float(theta), HEAD_DIM, sections))(_positions())
    assert torch.equal(ours, theirs)
    if sections[0] == HEAD_DIM // 2:
        assert torch.equal(Rotary(RopeSettings(float(theta), HEAD_DIM))(_positions()), theirs)


@pytest.mark.parametrize("sections", [(12, 10, 10), (16, 8, 8), (12, 14, 6)])
def test_interleaved_sections_are_those_of_qwen3_vl(sections: tuple[int, int, int]) -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    settings = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections), "mrope_interleaved": True}
    config = Qwen3VLTextConfig(head_dim=HEAD_DIM, rope_parameters=dict(settings))
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), _positions())
    angles = Rotary(rope_of({"rope_parameters": settings}, HEAD_DIM))(_positions())[:, 0, 0]
    assert torch.equal(angles.cos(), cos[0]) and torch.equal(angles.sin(), sin[0])


def test_columns_beyond_a_partial_rotary_are_left_alone() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import apply_rotary_pos_emb as apply_theirs

    rope = rope_of({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, HEAD_DIM)
    assert rope.dim == HEAD_DIM // 4
    heads = torch.randn(500, 1, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    angles = Rotary(rope)(_positions())
    config = TransformerConfig(num_layers=1, hidden_size=4 * HEAD_DIM, num_attention_heads=4)
    ours = apply_rotary_pos_emb(heads, angles, config, cp_group=object())
    cos, sin = angles[:, 0, 0].cos()[None], angles[:, 0, 0].sin()[None]
    theirs, _ = apply_theirs(heads.permute(1, 2, 0, 3), heads.permute(1, 2, 0, 3), cos, sin)
    torch.testing.assert_close(ours, theirs.permute(2, 0, 1, 3), rtol=0, atol=1e-6)
    assert torch.equal(ours[..., rope.dim :], heads[..., rope.dim :])


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1386294361119891, 3.0])
def test_megatron_core_takes_the_attention_factor(factor: float) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    assert _yarn_get_concentration_factor_from_config(config) == 1.0
    set_attention_factor(config, RopeSettings(1e4, 16, scaling=YarnScaling(4.0, 64, factor)))
    assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(factor, rel=1e-12)


def test_the_attention_factor_is_still_no_setting_of_megatron_core() -> None:
    """When it is one, `set_attention_factor` can go."""
    assert not [field.name for field in fields(TransformerConfig) if "yarn" in field.name]


def test_both_forms_of_config_say_the_same() -> None:
    hub = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "mrope_section": [8, 12, 12], **YARN}}
    ours = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "mrope_section": [8, 12, 12], **YARN}}
    assert rope_of(hub, HEAD_DIM) == rope_of(ours, HEAD_DIM)
    assert rope_of(hub, HEAD_DIM).sections == (8, 12, 12)
    plain = {"rope_theta": 1e6, "rope_scaling": None}
    assert rope_of(plain, HEAD_DIM) == RopeSettings(1e6, HEAD_DIM)
    older = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    assert rope_of(older, HEAD_DIM) == RopeSettings(1e6, HEAD_DIM, (8, 12, 12))


@pytest.mark.parametrize(
    ("rope", "why"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type=dynamic: this rotary scaling is not supported"),
        ({"rope_type": "longrope"}, "rope_type=longrope: this rotary scaling is not supported"),
        ({"type": "mrope"}, "rope_type=mrope: this rotary scaling is not supported"),
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type=yarn: original_max_position_embeddings missing"),
        ({"rope_type": "llama3", "factor": 4.0}, "rope_type=llama3: low_freq_factor, high_freq_factor, original_max"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [8, 12, 12]}, "the engine drops mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "one set for each kind of layer"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(rope: dict[str, Any], why: str) -> None:
    [problem] = unsupported_settings({"rope_theta": 1e4, "rope_scaling": rope})
    assert problem.startswith("model.hf: ") and why in problem


def test_a_missing_base_and_wrong_sections_are_refused() -> None:
    [problem] = unsupported_settings({})
    assert "rope_theta: missing" in problem
    with pytest.raises(ValueError, match=r"mrope_section=\[8, 8, 8\]: three numbers must sum to 32"):
        rope_of({"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}, HEAD_DIM)
