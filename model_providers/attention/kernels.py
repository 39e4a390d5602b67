# SPDX-License-Identifier: Apache-2.0
"""The one primitive that all attention here is made of: (q, k, v) -> (out, lse), and its backward.

Rows are divided into blocks: block i of q (q_lengths[i] rows) attends to block i of k and v (k_lengths[i] rows), whole
or causally. Causal blocks are square, and there alone the libraries agree on what causal means: with fewer queries than
keys, aten's CPU kernel aligns the mask to the upper left, flash-attn to the lower right.

The backward takes `out` and `lse` of the *whole* softmax: called on a part of the keys with them, it gives exactly
that part's share of the gradient, so partial results merge by their lse alone.

Shapes (types.py): T query rows, S key rows; A is a multiple of G.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Lengths = Sequence[int]
aten = torch.ops.aten


class FlashKernel(ABC):
    """A flash attention that returns its log-sum-exp. Stateless."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q [T, A, D], k and v [S, G, D] -> out [T, A, D] in q's dtype, lse [T, A] in fp32 (fp64 for fp64)."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_lengths: Lengths,
        k_lengths: Lengths,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq [T, A, D], dk and dv [S, G, D]); `grad`, `out` [T, A, D] and `lse` [T, A] are those of the whole
        softmax."""


class _DenseKernel(FlashKernel):
    """Equal neighbouring blocks make one dense call [blocks, heads, rows, D]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, causal: bool
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for count, queries, keys in _batches(q_lengths, k_lengths):
            out, lse = self._forward(causal, *_dense(count, (q, queries), (k, keys), (v, keys)))
            outs.append(out.transpose(1, 2).flatten(0, 1))
            lses.append(lse.transpose(1, 2).flatten(0, 1))
        return _cat(outs), _cat(lses)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_lengths: Lengths,
        k_lengths: Lengths,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for count, queries, keys in _batches(q_lengths, k_lengths):
            rows = _dense(count, (grad, queries), (q, queries), (k, keys), (v, keys), (out, queries), (lse, queries))
            parts.append([t.transpose(1, 2).flatten(0, 1) for t in self._backward(causal, *rows)])
        dq, dk, dv = (_cat(column) for column in zip(*parts, strict=True))
        return dq, dk, dv

    @abstractmethod
    def _forward(self, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self, causal: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class AtenCpu(_DenseKernel):
    """aten's flash attention on a CPU: fp64, fp32, bf16; grouped heads as they are."""

    def _forward(self, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    def _backward(
        self, causal: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


class AtenCuda(_DenseKernel):
    """aten's copy of flash-attn 2 on a GPU: fp16, bf16. It wants as many key heads as heads, so they are repeated."""

    def _forward(self, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeat = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse

    def _backward(
        self, causal: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        repeat = q.shape[1] // k.shape[1]
        full_k, full_v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state of a dropout that there is not
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            full_k,
            full_v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused,
        )
        return dq, *(t.unflatten(1, (-1, repeat)).sum(2) for t in (dk, dv))


class FlashAttnVarlen(FlashKernel):
    """The flash-attn package (2.8) on a GPU: all blocks in one call, grouped heads as they are."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, causal: bool
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        bounds = _bounds(q_lengths, q.device), _bounds(k_lengths, q.device), max(q_lengths), max(k_lengths)
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *bounds, 0.0, q.shape[-1] ** -0.5, causal)
        return out, lse.transpose(0, 1)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_lengths: Lengths,
        k_lengths: Lengths,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        bounds = _bounds(q_lengths, q.device), _bounds(k_lengths, q.device), max(q_lengths), max(k_lengths)
        _flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.transpose(0, 1).contiguous(),
            *grads,
            *bounds,
            dropout_p=0.0,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return grads


KERNELS: dict[str, type[FlashKernel]] = {
    "aten_cpu": AtenCpu,
    "aten_cuda": AtenCuda,
    "flash_attn": FlashAttnVarlen,
}


def _batches(q_lengths: Lengths, k_lengths: Lengths) -> Iterator[tuple[int, slice, slice]]:
    """(number of blocks, their query rows, their key rows) for each stretch of equal blocks."""
    query = key = 0
    for (num_q, num_k), group in itertools.groupby(zip(q_lengths, k_lengths, strict=True)):
        count = len(list(group))
        yield count, slice(query, query + count * num_q), slice(key, key + count * num_k)
        query, key = query + count * num_q, key + count * num_k


def _dense(count: int, *rows: tuple[Tensor, slice]) -> list[Tensor]:
    """[count * rows, heads, ...] -> [count, heads, rows, ...] of each."""
    return [tensor[window].unflatten(0, (count, -1)).transpose(1, 2) for tensor, window in rows]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@functools.lru_cache(maxsize=256)
def _bounds_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _bounds(lengths: Lengths, device: torch.device) -> Tensor:
    """cu_seqlens, copied to the device once for all layers."""
    return _bounds_of(tuple(lengths), device)
