# SPDX-License-Identifier: Apache-2.0
"""DeepStack (arXiv 2406.04334): the first decoder layers add media features of their own to the rows of media.

A row of media embeddings is [main | level 0 | level 1 ...], each H wide: `main` is the embedding of the token, level i
is added to the residual stream after decoder layer i + 1.

Shapes: types.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_providers.attention.core import BatchLayout


def place_embeddings(hidden: Tensor, layout: BatchLayout, first: int, recomputed: bool) -> Tensor:
    """Token embeddings [T/tp, 1, H] of the rows from `first` on, with the main columns of media in their place.

    `recomputed`: every layer is recomputed in the backward, in a backward pass of its own. Then these passes must not
    go through what is behind the embeddings, which only one can; they end at a copy of them, in `layout`, and what
    they leave there goes on once, with the gradient of the result.
    """
    if layout.media_embeds is None:
        return hidden
    rows, values = layout.media_columns(0, first, hidden)
    hidden = hidden.scatter(0, rows, values)
    embeds = layout.media_embeds
    if recomputed and embeds.requires_grad and embeds.shape[1] > hidden.shape[2]:
        layout.media_embeds = embeds.detach().requires_grad_()
        hidden = _PassOnGradient.apply(hidden, embeds, layout)
    return hidden


def add_features(hidden: Tensor, layout: BatchLayout, first: int, layer_number: int) -> Tensor:
    """The output [T/tp, 1, H] of layer `layer_number` (from 1), with the features of its level added."""
    if layout.media_embeds is None or layout.media_embeds.shape[1] <= layer_number * hidden.shape[2]:
        return hidden
    rows, values = layout.media_columns(layer_number, first, hidden)
    return hidden.scatter_add(0, rows, values)


class _PassOnGradient(torch.autograd.Function):
    """(hidden, embeds) -> hidden. Its backward comes after that of all layers, and hands `embeds` the gradient that
    these have left in `layout.media_embeds`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embeds: Tensor, layout: BatchLayout) -> Tensor:
        ctx.layout = layout
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grad, ctx.layout.media_embeds.grad, None
