# SPDX-License-Identifier: Apache-2.0
"""The last layer, computed only where its output is read: in the rows that predict a response token.

Keys and values still come from all rows; queries, output projection, feed-forward network and final norm belong to the
K predicting rows alone. Nothing else reads what the layer would make of a prompt, so results and gradients stay the
same, and with few layers or a long prompt much of the work is saved.

Shapes: types.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from model_providers.attention.core import BatchLayout, padded_count
from model_providers.layer import Layer


class LastLayer(Layer):
    """[T/tp, 1, H] -> [K'/tp, 1, H]: the rows of `BatchLayout.predicting_rows`, and zeros up to a multiple of tp."""

    def _forward_attention(
        self, hidden_states: Tensor, *, packed_seq_params: BatchLayout, **inputs: Any
    ) -> tuple[Tensor, None]:
        """Megatron-core's, less what we do not use (cross attention, offloading); the residual is that of the
        predicting rows."""
        tp = self.pg_collection.tp if self.config.sequence_parallel else None
        attention = {name: inputs[name] for name in ("attention_mask", "rotary_pos_emb")}
        out_with_bias = self.self_attention(
            self.input_layernorm(hidden_states), packed_seq_params=packed_seq_params, **attention
        )
        residual = pick_rows(hidden_states, packed_seq_params.predicting_rows, tp)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(out_with_bias, residual, self.hidden_dropout), None


def pick_rows(hidden: Tensor, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows `rows` int64 [K] of T, of which each rank of `group` holds `hidden` [T/tp, 1, H] -> [K'/tp, 1, H].
    `group` None: one rank holds all."""
    size = group.size() if group is not None else 1
    padding = padded_count(len(rows), size) - len(rows)
    if group is None:
        return pad(hidden.index_select(0, rows), (0, 0, 0, 0, 0, padding))
    first = group.rank() * len(hidden)
    here = ((rows >= first) & (rows < first + len(hidden))).nonzero().squeeze(1)
    spread = torch.zeros(len(rows) + padding, *hidden.shape[1:], dtype=hidden.dtype, device=hidden.device)
    spread = spread.index_copy(0, here, hidden.index_select(0, rows[here] - first))
    return reduce_scatter_to_sequence_parallel_region(spread, group=group)
