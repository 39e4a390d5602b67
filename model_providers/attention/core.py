# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's `core_attention`, ours: packed segments, shared prefixes and context parallelism, all composing.

The layout of a micro-batch travels as `packed_seq_params`, never as module state: recomputation and 1F1B interleave
micro-batches. Shapes: types.py; the batch dimension is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from model_providers.attention.blockwise import Backward, Forward
from model_providers.attention.exchange import EXCHANGES, HeadsToTokens, TokensToHeads, add_own_gradient, heads_of_rank
from model_providers.attention.kernels import KERNELS, FlashKernel
from model_providers.attention.segments import AttentionPlan


@dataclass(kw_only=True)
class BatchLayout(PackedSeqParams):
    """What the model must know about this rank's part of a micro-batch beyond token ids and positions.

    attention: what this rank's rows attend to; last_attention: likewise for the K rows that predict a response token,
        all that the last layer computes
    predicting_rows [K]: those rows, ascending
    predictors [R]: which of them predicts each response token (the last token of a shared prompt predicts the first
        token of every response); targets [R]: those tokens
    media_rows [n]: rows that hold media tokens; media_embeds [n, H * (1 + levels)]: what stands there, and the features
        that the first layers add (deepstack.py). On the first stage only, and only where there are media
    """

    qkv_format: str = "sbhd"
    attention: AttentionPlan
    last_attention: AttentionPlan
    predicting_rows: Tensor
    predictors: Tensor
    targets: Tensor
    media_rows: Tensor | None = None
    media_embeds: Tensor | None = None

    def media_columns(self, part: int, first: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows from `first` on that `hidden` [T/tp, 1, H] holds: those of media, as an index for `scatter`, and
        the columns [part * H, (part + 1) * H) of what stands there. Both [rows, 1, H]."""
        assert self.media_rows is not None and self.media_embeds is not None
        num_rows, _, width = hidden.shape
        mine = (self.media_rows >= first) & (self.media_rows < first + num_rows)
        rows = (self.media_rows[mine] - first)[:, None, None].expand(-1, 1, width)
        values = self.media_embeds[:, part * width : (part + 1) * width][mine]
        return rows, values.unsqueeze(1).to(hidden.dtype)


def core_attention(kernel_name: str, last_layer: bool = False) -> type[PlannedAttention]:
    """The class that a layer spec takes, with the kernel chosen."""
    return type("PlannedAttention", (PlannedAttention,), {"kernel": KERNELS[kernel_name](), "is_last": last_layer})


class PlannedAttention(MegatronModule):
    """q [T,1,A,D], k and v [T,1,G,D] -> [T,1,A*D], in the last layer [K',1,A*D] (last_layer.py).

    `cp_comm_type`: all_gather, p2p (ring) or a2a (heads)."""

    kernel: FlashKernel
    is_last: bool

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused_by_us: Any,
    ):
        super().__init__(config)
        assert pg_collection is not None
        self._group, self._comm = pg_collection.cp, cp_comm_type

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
        plan = packed_seq_params.attention
        if self.is_last:
            plan = packed_seq_params.last_attention
            query = self._asking(query, packed_seq_params.predicting_rows)
        # A copy of v, which is a view of the whole projection: kept for the backward, it would keep all of that.
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1).contiguous()
        if self._comm == "a2a" and self._group.size() > 1:
            out = _attend_by_heads(self.kernel, q, k, v, plan, self._group)
        else:
            out = _SoftmaxAttention.apply(q, k, v, plan, self.kernel, self._comm or "all_gather", self._group)
        return out.flatten(1).unsqueeze(1)

    def _asking(self, query: Tensor, rows: Tensor) -> Tensor:
        """The queries [K', 1, A, D] of `rows` int64 [K], padded as the last layer pads them."""
        num_slices = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        padding = padded_count(len(rows), num_slices) - len(rows)
        return pad(query.index_select(0, rows), (0, 0, 0, 0, 0, 0, 0, padding))


def padded_count(num_rows: int, multiple: int) -> int:
    """At least one row, and equally many on each of `multiple` ranks."""
    return max(1, -(-num_rows // multiple)) * multiple


def _attend_by_heads(
    kernel: FlashKernel, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, group: dist.ProcessGroup
) -> Tensor:
    """q [T,A,D], k and v [T,G,D] -> [T,A,D]: each rank computes some heads of all tokens; padding rows get zeros."""
    num_queries, num_rows, num_heads = plan.query_sizes[group.rank()], plan.rank_sizes[group.rank()], q.shape[1]
    chosen = [heads_of_rank(num_heads, k.shape[1], rank, group.size()) for rank in range(group.size())]
    heads, kv_heads = [list(c[0]) for c in chosen], [c[1] for c in chosen]
    q_all = TokensToHeads.apply(q[:num_queries], heads, plan.query_sizes, group)
    k_all, v_all = (TokensToHeads.apply(t[:num_rows], kv_heads, plan.rank_sizes, group) for t in (k, v))
    out = _SoftmaxAttention.apply(q_all, k_all, v_all, plan, kernel, "all_gather", None)
    out = HeadsToTokens.apply(out, num_heads, plan.query_sizes, group)
    return pad(out, (0, 0, 0, 0, 0, len(q) - num_queries))


class _SoftmaxAttention(torch.autograd.Function):
    """q [T,A,D], k and v [T,G,D] -> [T,A,D]: own rows first, then the block of each other rank when it is received.
    `group` None: there is no other rank."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        kernel: FlashKernel,
        comm: str,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        work = Forward(kernel, q, k, v, plan)
        work.attend(k, v, plan.own)
        if group is not None and group.size() > 1:
            exchange = EXCHANGES[comm](plan, group)
            for rank, block in exchange.blocks(exchange.own_block(k, v)):
                work.attend(block[:, 0], block[:, 1], plan.blocks[rank])
        out = work.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, work.lse)
        ctx.plan, ctx.kernel, ctx.comm, ctx.group = plan, kernel, comm, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        work = Backward(ctx.kernel, grad, q, k, v, out, lse, plan)
        work.attend(k, v, work.dk, work.dv, plan.own)
        if group is not None and group.size() > 1:
            exchange = EXCHANGES[ctx.comm](plan, group)
            own = exchange.own_block(k, v)
            for rank, block, gradient in exchange.blocks_and_gradients(own, lse.dtype):
                work.attend(block[:, 0], block[:, 1], gradient[:, 0], gradient[:, 1], plan.blocks[rank])
            add_own_gradient(work.dk, work.dv, exchange.gradient, plan, group.rank())
        return work.dq.to(q.dtype), work.dk.to(k.dtype), work.dv.to(v.dtype), None, None, None, None
