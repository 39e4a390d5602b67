# SPDX-License-Identifier: Apache-2.0
"""Shape and weight table of Qwen2.5-VL's language model. The vision tower keeps its HF names and has no entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_providers.shape import TransformerShape
from model_providers.weight_map import QKV, Entry, GatedUp, HfTensor, Replicated, SplitCols, Vocab, WeightMap


def weight_map(shape: TransformerShape) -> WeightMap:
    hidden, ffn, dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    q_rows, kv_rows = shape.num_heads * dim, shape.num_groups * dim
    mcore, engine, hf = "decoder.layers.*.", "language_model.model.layers.*.", "model.layers.*."

    def vector(name: str, rows: int) -> HfTensor:
        return HfTensor(name, rows, is_vector=True)

    def q_k_v(kind: str) -> tuple[HfTensor, ...]:
        names = (f"{hf}self_attn.{p}_proj.{kind}" for p in "qkv")
        rows = (q_rows, kv_rows, kv_rows)
        if kind == "bias":
            return tuple(vector(n, r) for n, r in zip(names, rows, strict=True))
        return tuple(HfTensor(n, r, hidden) for n, r in zip(names, rows, strict=True))

    qkv = QKV(shape.num_heads, shape.num_groups, dim)
    embedding = HfTensor("model.embed_tokens.weight", shape.vocab_size, hidden)
    head = embedding if shape.tied_embeddings else HfTensor("lm_head.weight", shape.vocab_size, hidden)
    embedding_engine = "language_model.model.embed_tokens.weight"
    gate_up = tuple(HfTensor(f"{hf}mlp.{p}_proj.weight", ffn, hidden) for p in ("gate", "up"))
    entries = [
        Entry("embedding.word_embeddings.weight", embedding_engine, (embedding,), Vocab()),
        Entry(
            mcore + "self_attention.linear_qkv.layer_norm_weight",
            engine + "input_layernorm.weight",
            (vector(hf + "input_layernorm.weight", hidden),),
            Replicated(),
        ),
        Entry(mcore + "self_attention.linear_qkv.weight", engine + "self_attn.qkv_proj.weight", q_k_v("weight"), qkv),
        Entry(mcore + "self_attention.linear_qkv.bias", engine + "self_attn.qkv_proj.bias", q_k_v("bias"), qkv),
        Entry(
            mcore + "self_attention.linear_proj.weight",
            engine + "self_attn.o_proj.weight",
            (HfTensor(hf + "self_attn.o_proj.weight", hidden, q_rows),),
            SplitCols(),
        ),
        Entry(
            mcore + "mlp.linear_fc1.layer_norm_weight",
            engine + "post_attention_layernorm.weight",
            (vector(hf + "post_attention_layernorm.weight", hidden),),
            Replicated(),
        ),
        Entry(mcore + "mlp.linear_fc1.weight", engine + "mlp.gate_up_proj.weight", gate_up, GatedUp()),
        Entry(
            mcore + "mlp.linear_fc2.weight",
            engine + "mlp.down_proj.weight",
            (HfTensor(hf + "mlp.down_proj.weight", hidden, ffn),),
            SplitCols(),
        ),
        Entry(
            "decoder.final_layernorm.weight",
            "language_model.model.norm.weight",
            (vector("model.norm.weight", hidden),),
            Replicated(),
        ),
        Entry(
            "output_layer.weight",
            embedding_engine if shape.tied_embeddings else "language_model.lm_head.weight",
            (head,),
            Vocab(),
        ),
    ]
    return WeightMap(entries, shape.num_layers)


def shape_of(config: Mapping[str, Any]) -> TransformerShape:
    """The language model's shape from a checkpoint's config.json, flat (as on the hub) or with a `text_config`."""
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    heads = text["num_attention_heads"]
    return TransformerShape(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_heads=heads,
        num_groups=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab_size=text["vocab_size"],
        rms_eps=text["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or text["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
        qkv_bias=True,
        tied_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        max_positions=text["max_position_embeddings"],
    )
