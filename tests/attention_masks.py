# SPDX-License-Identifier: Apache-2.0
"""The independent truth of attention: a boolean mask over all packed tokens, and softmax under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model_providers.attention.segments import Segment


def segments_of(groups: Sequence[tuple[int, Sequence[int]]]) -> list[Segment]:
    """Segments of (prompt length, response lengths); a group without responses is a plain sequence."""
    segments: list[Segment] = []
    position = 0
    for prompt, responses in groups:
        parent = len(segments)
        segments.append(Segment(position, position + prompt))
        position += prompt
        for length in responses:
            segments.append(Segment(position, position + length, parent))
            position += length
    return segments


def mask_of(segments: Sequence[Segment]) -> Tensor:
    """[T, T], True where the row's token attends to the column's."""
    mask = torch.zeros(segments[-1].stop, segments[-1].stop, dtype=torch.bool)
    for s in segments:
        mask[s.start : s.stop, s.start : s.stop] = torch.ones(s.length, s.length).tril().bool()
        if s.prefix is not None:
            mask[s.start : s.stop, segments[s.prefix].start : segments[s.prefix].stop] = True
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [T, A, D], k and v [T, K, D] -> [T, A, D], by matrix products and a softmax, no flash kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        rows = (t.transpose(0, 1)[None] for t in (q, k, v))
        return scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
