# SPDX-License-Identifier: Apache-2.0
"""Core attention over packed sequences: every segment of a micro-batch attends to itself, causally, and to nothing
else.

The layout travels as `packed_seq_params` (never module state: recomputation and 1F1B interleave micro-batches).
Shapes: T packed tokens, B=1, A heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class BatchLayout(PackedSeqParams):
    """What the model must know about one packed micro-batch beyond its token ids.

    segments: length of each packed sequence, padding included as a last segment; they add up to T
    logit_rows [R]: packed positions whose hidden states predict a response token; targets [R]: those tokens
    video_rows [n]: packed positions that hold video tokens; video_embeds [n, H]: what stands there (first stage only)
    """

    qkv_format: str = "sbhd"
    segments: tuple[int, ...] = ()
    logit_rows: Tensor | None = None
    targets: Tensor | None = None
    video_rows: Tensor | None = None
    video_embeds: Tensor | None = None


class PackedAttention(MegatronModule):
    """Megatron-core `core_attention`: q [T,1,A,D], k and v [T,1,K,D] -> [T,1,A*D], with grouped-query heads."""

    def __init__(self, config: TransformerConfig, layer_number: int, **unused_by_us: Any):
        super().__init__(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: BatchLayout | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None and attention_mask is None, "the layout is the only mask"
        q, k, v = (t.squeeze(1) for t in (query, key, value))
        parts, start = [], 0
        for length, run in groupby(packed_seq_params.segments):
            count = len(list(run))
            window = slice(start, start + count * length)
            parts.append(_causal(q[window], k[window], v[window], count))
            start = window.stop
        assert start == q.shape[0], f"segments cover {start} of {q.shape[0]} tokens"
        return torch.cat(parts).unsqueeze(1)


def _causal(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Causal attention of `count` equally long segments at once: [count*L, A, D] -> [count*L, A*D]."""
    q, k, v = (t.unflatten(0, (count, -1)).transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1).flatten(1)
