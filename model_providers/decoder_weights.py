# SPDX-License-Identifier: Apache-2.0
"""Weight table of a decoder in the Llama layout, which the language models of all Qwen families have.

What differs between families is where the engine's names begin, which of QKV bias, q/k norms and a tied output there
are, and whether the feed-forward network is dense or a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from model_providers.shape import TransformerShape
from model_providers.weight_map import (
    QKV,
    Entry,
    Expert,
    GatedUp,
    HfTensor,
    Replicated,
    SplitCols,
    Vocab,
    WeightMap,
)

MCORE, HF = "decoder.layers.*.", "model.layers.*."


def decoder_weight_map(shape: TransformerShape, engine_prefix: str = "", expert_tensor: int = 1) -> WeightMap:
    """`engine_prefix` is what the engine puts before "model.layers": "language_model." in multimodal families.

    The trainer splits an expert over `expert_tensor` ranks; our own never does.
    """
    engine = f"{engine_prefix}model.layers.*."
    mlp = _experts(shape, engine, expert_tensor) if shape.num_experts else _mlp(shape, engine)
    layer = [*_attention(shape, engine), *mlp]
    return WeightMap(_around_layers(shape, engine_prefix, layer), shape.num_layers)


def _around_layers(shape: TransformerShape, engine_prefix: str, layer: list[Entry]) -> Iterator[Entry]:
    """Embedding, the entries of a layer, final norm, output; a tied output is the embedding under a second name."""
    hidden = shape.hidden_size
    embedding_engine = f"{engine_prefix}model.embed_tokens.weight"
    embedding = HfTensor("model.embed_tokens.weight", shape.vocab_size, hidden)
    head = embedding if shape.tied_embeddings else HfTensor("lm_head.weight", shape.vocab_size, hidden)
    head_engine = embedding_engine if shape.tied_embeddings else f"{engine_prefix}lm_head.weight"
    yield Entry("embedding.word_embeddings.weight", embedding_engine, (embedding,), Vocab())
    yield from layer
    yield _norm("decoder.final_layernorm.weight", f"{engine_prefix}model.norm.weight", "model.norm.weight", hidden)
    yield Entry("output_layer.weight", head_engine, (head,), Vocab())


def _attention(shape: TransformerShape, engine: str) -> Iterator[Entry]:
    """A layer's two norms and its attention; `engine` is what the engine's names of a layer begin with."""
    hidden, dim = shape.hidden_size, shape.head_dim
    q_rows, kv_rows = shape.num_heads * dim, shape.num_groups * dim
    qkv = QKV(shape.num_heads, shape.num_groups, dim)
    fused, projections = "self_attention.linear_qkv.", list(zip("qkv", (q_rows, kv_rows, kv_rows), strict=True))
    for mcore, name in ((fused, "input_layernorm.weight"), ("mlp.linear_fc1.", "post_attention_layernorm.weight")):
        yield _norm(f"{MCORE}{mcore}layer_norm_weight", engine + name, HF + name, hidden)
    weights = tuple(HfTensor(f"{HF}self_attn.{p}_proj.weight", rows, hidden) for p, rows in projections)
    yield Entry(f"{MCORE}{fused}weight", engine + "self_attn.qkv_proj.weight", weights, qkv)
    if shape.qkv_bias:
        biases = tuple(HfTensor(f"{HF}self_attn.{p}_proj.bias", rows, is_vector=True) for p, rows in projections)
        yield Entry(f"{MCORE}{fused}bias", engine + "self_attn.qkv_proj.bias", biases, qkv)
    if shape.qk_norm:
        for p in "qk":
            name = f"self_attn.{p}_norm.weight"
            yield _norm(f"{MCORE}self_attention.{p}_layernorm.weight", engine + name, HF + name, dim)
    output = HfTensor(HF + "self_attn.o_proj.weight", hidden, q_rows)
    yield Entry(MCORE + "self_attention.linear_proj.weight", engine + "self_attn.o_proj.weight", (output,), SplitCols())


def _mlp(shape: TransformerShape, engine: str) -> Iterator[Entry]:
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    gate_up = tuple(HfTensor(f"{HF}mlp.{p}_proj.weight", ffn, hidden) for p in ("gate", "up"))
    down = HfTensor(HF + "mlp.down_proj.weight", hidden, ffn)
    yield Entry(MCORE + "mlp.linear_fc1.weight", engine + "mlp.gate_up_proj.weight", gate_up, GatedUp())
    yield Entry(MCORE + "mlp.linear_fc2.weight", engine + "mlp.down_proj.weight", (down,), SplitCols())


def _experts(shape: TransformerShape, engine: str, expert_tensor: int) -> Iterator[Entry]:
    """Router and experts. In the trainer every expert has parameters of its own; in the engine a layer has two."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    router = HfTensor(HF + "mlp.gate.weight", shape.num_experts, hidden)
    yield Entry(MCORE + "mlp.router.weight", engine + "mlp.gate.weight", (router,), Replicated())
    stacked = engine + "mlp.experts.routed_experts."
    for index in range(shape.num_experts):
        mcore, hf = f"{MCORE}mlp.experts.{index}.", f"{HF}mlp.experts.{index}."
        gate_up = tuple(HfTensor(f"{hf}{p}_proj.weight", ffn, hidden) for p in ("gate", "up"))
        down = HfTensor(hf + "down_proj.weight", hidden, ffn)
        place = (index, shape.num_experts, expert_tensor)
        yield Entry(mcore + "linear_fc1.weight", stacked + "w13_weight", gate_up, Expert(GatedUp(), *place))
        yield Entry(mcore + "linear_fc2.weight", stacked + "w2_weight", (down,), Expert(SplitCols(), *place))


def _norm(mcore: str, engine: str, hf: str, size: int) -> Entry:
    return Entry(mcore, engine, (HfTensor(hf, size, is_vector=True),), Replicated())
