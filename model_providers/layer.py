# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's transformer layer with media features, and with its feed-forward part computed some rows at a time.

In a long sequence the inner rows of the feed-forward network, several times wider than the residual stream, are the
most that a rank holds at once. No row needs another there, so norm, network and residual are computed FEED_FORWARD_ROWS
rows at a time: without gradients, and with them where the recipe recomputes. Then a layer keeps its rows before the
norm, and the backward computes each part again, followed at once by its gradients. Experts are left to Megatron-core,
for ranks that exchange tokens need not have equally many.

Shapes: types.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_rl.runtime.chunks import FEED_FORWARD_ROWS
from model_providers.deepstack import add_features


def first_row(hidden: Tensor, group: dist.ProcessGroup, config: TransformerConfig) -> int:
    """Which of the T rows the first one of `hidden` [T/tp, 1, H] is. `group`: the tensor parallel ranks."""
    return group.rank() * hidden.shape[0] if config.sequence_parallel else 0


class Layer(TransformerLayer):
    def forward(self, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron-core's output [T/tp, 1, H] and context, and the media features of this layer added."""
        hidden, context = super().forward(*args, **inputs)
        first = first_row(hidden, self.pg_collection.tp, self.config)
        return add_features(hidden, inputs["packed_seq_params"], first, self.layer_number), context

    def _forward_mlp(self, hidden_states: Tensor, inference_context: None = None, padding_mask: None = None) -> Tensor:
        if self.is_moe_layer:
            return super()._forward_mlp(hidden_states, inference_context, padding_mask)
        if not torch.is_grad_enabled():
            return by_rows(self._feed_forward, hidden_states, self._num_rows)
        if self.config.recompute_granularity is None:
            return super()._forward_mlp(hidden_states, inference_context, padding_mask)
        # The second forward of a layer that is recomputed as a whole needs no values any more.
        return RecomputedRows.apply(self._feed_forward, hidden_states, self._num_rows, is_checkpointing())

    @property
    def _num_rows(self) -> int:
        """Of this rank at a time; under sequence parallelism the network gathers as many from each rank."""
        return FEED_FORWARD_ROWS // (self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        """[rows, 1, H] -> [rows, 1, H]. No biases and no dropout here: the residual is simply added."""
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, num_rows: int) -> Tensor:
    """`function(x)` [T, ...] of x [T, ...], for a function of single rows, `num_rows` at a time. Without gradients."""
    out = torch.empty_like(x)
    for rows, out_rows in zip(x.split(num_rows), out.split(num_rows), strict=True):
        out_rows.copy_(function(rows))
    return out


class RecomputedRows(torch.autograd.Function):
    """`by_rows` that keeps only x for its backward.

    Gradients of the function's parameters are accumulated in them part by part, as Megatron-core's own checkpoint does.
    With `without_values` the result is NaN, so that a value which is read after all does not pass for one.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, num_rows: int, without_values: bool
    ) -> Tensor:
        ctx.function, ctx.num_rows = function, num_rows
        ctx.save_for_backward(x)
        return torch.full_like(x, torch.nan) if without_values else by_rows(function, x, num_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        [x] = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        parts = (tensor.split(ctx.num_rows) for tensor in (x, grad, grad_x))
        for rows, grad_out, grad_rows in zip(*parts, strict=True):
            given = rows.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(given)
            torch.autograd.backward(out, grad_out)
            grad_rows.copy_(given.grad)
        return None, grad_x, None, None
