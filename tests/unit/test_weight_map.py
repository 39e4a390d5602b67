# SPDX-License-Identifier: Apache-2.0
"""Layouts against the fused tensors that Megatron-core and vLLM describe, built here with plain torch operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatron_rl.runtime.device import define_torchvision_operators
from model_providers.hf_files import canonical_hf_name
from model_providers.qwen2_5_vl.weights import weight_map
from model_providers.shape import RopeSettings, TransformerShape
from model_providers.weight_map import (
    QKV,
    Block,
    Entry,
    GatedUp,
    HfTensor,
    Replicated,
    Shard,
    SplitCols,
    Vocab,
    canonical_name,
    intersect,
    padded_vocab,
)

HIDDEN = 5


def numbered(*tensors: HfTensor) -> dict[str, Tensor]:
    """Tensors in which every element has a number of its own, from 1."""
    result, first = {}, 1
    for t in tensors:
        count = t.rows * t.cols
        result[t.name] = torch.arange(first, first + count).view(t.rows, t.cols)
        first += count
    return result


def filled(shard: Shard, full: Mapping[str, Tensor]) -> Tensor:
    """The local tensor: zeros where no block lies."""
    rows, cols = shard.shape if len(shard.shape) == 2 else (shard.shape[0], 1)
    local = torch.zeros(rows, cols, dtype=torch.int64)
    for block in shard.blocks:
        assert not local[block.local_slices].any(), "blocks overlap"
        local[block.local_slices] = full[block.hf][block.hf_slices]
    return local


def qkv_tensors(num_heads: int, num_groups: int, dim: int, cols: int = HIDDEN) -> tuple[HfTensor, ...]:
    rows = (num_heads * dim, num_groups * dim, num_groups * dim)
    return tuple(HfTensor(name, r, cols, is_vector=cols == 1) for name, r in zip("qkv", rows, strict=True))


QKV_CASES = [
    (4, 2, 2, 1),
    (4, 2, 2, 2),
    (4, 2, 2, 4),
    (8, 2, 2, 4),
    (6, 3, 2, 3),
    (6, 3, 4, 2),
    (8, 1, 2, 4),
    (28, 4, 2, 2),
]
VLLM_CASES = [case for case in QKV_CASES if case[1] % case[3] == 0 or case[3] % case[1] == 0]  # it refuses the others


@pytest.mark.parametrize(("num_heads", "num_groups", "dim", "world"), QKV_CASES)
@pytest.mark.parametrize("cols", [HIDDEN, 1])
def test_megatron_interleaves_q_k_v_by_group(num_heads: int, num_groups: int, dim: int, world: int, cols: int) -> None:
    hf = qkv_tensors(num_heads, num_groups, dim, cols)
    full = numbered(*hf)
    by_group = [full[name].view(num_groups, -1, cols) for name in "qkv"]
    fused = torch.cat(by_group, dim=1).reshape(-1, cols)
    shards = [filled(QKV(num_heads, num_groups, dim).trainer(hf, rank, world), full) for rank in range(world)]
    assert torch.equal(torch.cat(shards), fused)
    assert len({s.shape for s in shards}) == 1


@pytest.mark.parametrize(("num_heads", "num_groups", "dim", "world"), VLLM_CASES)
def test_vllm_stacks_q_k_v_and_repeats_few_kv_heads(num_heads: int, num_groups: int, dim: int, world: int) -> None:
    hf = qkv_tensors(num_heads, num_groups, dim)
    full = numbered(*hf)
    repeats = max(1, world // num_groups)
    heads = {name: full[name].view(-1, dim, HIDDEN) for name in "qkv"}
    expected = [heads["q"]] + [heads[name].repeat_interleave(repeats, dim=0) for name in "kv"]
    for rank in range(world):
        mine = torch.cat([part.chunk(world)[rank].reshape(-1, HIDDEN) for part in expected])
        assert torch.equal(filled(QKV(num_heads, num_groups, dim).engine(hf, rank, world), full), mine)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_gate_and_up_are_cut_one_by_one(world: int, side: str) -> None:
    hf = (HfTensor("gate", 8, HIDDEN), HfTensor("up", 8, HIDDEN))
    full = numbered(*hf)
    for rank in range(world):
        expected = torch.cat([full["gate"].chunk(world)[rank], full["up"].chunk(world)[rank]])
        assert torch.equal(filled(getattr(GatedUp(), side)(hf, rank, world), full), expected)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_row_parallel_weights_are_cut_by_columns(world: int) -> None:
    hf = (HfTensor("down", 3, 8),)
    full = numbered(*hf)
    for rank in range(world):
        for shard in (SplitCols().trainer(hf, rank, world), SplitCols().engine(hf, rank, world)):
            assert torch.equal(filled(shard, full), full["down"].chunk(world, dim=1)[rank])


@pytest.mark.parametrize("rows", [256, 272, 300, 129, 64])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_vocabulary_is_padded_with_zeros_on_either_side(rows: int, world: int) -> None:
    hf = (HfTensor("embed", rows, HIDDEN),)
    full = numbered(*hf)
    for side, multiple in (("trainer", 128), ("engine", 64)):
        padded = torch.zeros(-(-rows // multiple) * multiple, HIDDEN, dtype=torch.int64)
        padded[:rows] = full["embed"]
        shards = [filled(getattr(Vocab(), side)(hf, rank, world), full) for rank in range(world)]
        assert torch.equal(torch.cat(shards), padded)


def test_padded_vocabulary_is_the_same_for_usual_sizes() -> None:
    assert {padded_vocab(151_936, tp) for tp in (1, 2, 4, 8, 16)} == {151_936}
    assert {padded_vocab(272, tp) for tp in (1, 2, 4, 8)} == {384}
    assert padded_vocab(272, 3) == 384 and padded_vocab(272, 5) == 640


def test_replicated_vectors_are_whole_and_one_dimensional() -> None:
    hf = (HfTensor("norm", 7, is_vector=True),)
    assert Replicated().trainer(hf, 3, 4) == Replicated().engine(hf, 0, 1)
    assert Replicated().trainer(hf, 3, 4).shape == (7,)
    assert torch.equal(filled(Replicated().trainer(hf, 3, 4), numbered(*hf)), torch.arange(1, 8)[:, None])


@pytest.mark.parametrize(
    ("layout", "hf", "what"),
    [
        (SplitCols(), (HfTensor("down", 4, 6),), "down=6"),
        (GatedUp(), (HfTensor("gate", 6, 2), HfTensor("up", 6, 2)), "gate=6"),
        (QKV(6, 3, 1), qkv_tensors(6, 3, 1), "rollout.tensor=4: not a multiple of 3 KV heads"),
    ],
)
def test_a_size_that_does_not_divide_is_named(layout, hf, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        layout.engine(hf, 0, 4)


def test_intersection_knows_both_places() -> None:
    mine = Block("w", (2, 6), (0, 10), at=(100, 0))
    theirs = Block("w", (4, 9), (5, 20), at=(0, 7))
    source, target = intersect(mine, theirs)
    assert source == Block("w", (4, 6), (5, 10), at=(102, 5))
    assert target == Block("w", (4, 6), (5, 10), at=(0, 7))
    assert intersect(mine, Block("w", (6, 9), (0, 10), (0, 0))) is None
    assert intersect(mine, Block("other", (2, 6), (0, 10), (0, 0))) is None


def shape(tied: bool) -> TransformerShape:
    return TransformerShape(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=12,
        num_heads=4,
        num_groups=2,
        head_dim=2,
        vocab_size=30,
        rms_eps=1e-6,
        rope=RopeSettings(1e4, 2),
        qkv_bias=True,
        tied_embeddings=tied,
        max_positions=64,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_table_holds_every_hf_tensor_once_per_side(tied: bool) -> None:
    """Against the names that Qwen2.5-VL checkpoints are published with."""
    weights = weight_map(shape(tied))
    per_layer = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    per_layer += ["self_attn.o_proj.weight", *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))]
    per_layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    expected = {f"model.layers.{i}.{name}" for i in range(3) for name in per_layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(weights.hf_tensors()) == expected
    in_engine: Counter[str] = Counter(t.name for e in weights.engine_entries().values() for t in e.hf)
    assert in_engine == Counter(dict.fromkeys(expected, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_table_covers_transformers_own_state_dict(tied: bool) -> None:
    define_torchvision_operators()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 30,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0]},
        "tie_word_embeddings": tied,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        )
    shapes = {canonical_hf_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    language = {name: s for name, s in shapes.items() if not name.startswith("visual.")}
    assert {t.name: t.shape for t in weight_map(shape(tied)).hf_tensors().values()} == language


def test_names_of_local_and_fused_norms_agree() -> None:
    fused = "decoder.layers.5.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name("decoder.layers.1.input_layernorm.weight", 4) == fused
    assert canonical_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", 4) == fused
    assert canonical_name("decoder.layers.0.pre_mlp_layernorm.weight", 4) == (
        "decoder.layers.4.mlp.linear_fc1.layer_norm_weight"
    )
    assert canonical_name("decoder.final_layernorm.weight", 4) == "decoder.final_layernorm.weight"


def test_unknown_parameter_is_named() -> None:
    with pytest.raises(KeyError, match="decoder.layers.9"):
        weight_map(shape(False))["decoder.layers.9.mlp.linear_fc1.weight"]


def test_layers_are_numbered_in_all_three_worlds() -> None:
    entry: Entry = weight_map(shape(False))["decoder.layers.2.mlp.linear_fc2.weight"]
    assert entry.engine == "language_model.model.layers.2.mlp.down_proj.weight"
    assert entry.hf == (HfTensor("model.layers.2.mlp.down_proj.weight", 8, 12),)
