# SPDX-License-Identifier: Apache-2.0
"""Attention of one rank's queries, one block of keys after the other, merged by log-sum-exp; and its gradient.

Shapes (types.py): T this rank's queries, padding at the end. Sums are kept in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_providers.attention.kernels import FlashKernel
from model_providers.attention.segments import AttentionPlan, Interval, QuerySlice


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results are added up."""
    return dtype if dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor, intervals: Sequence[Interval]) -> Tensor:
    """[T, ...] -> [rows of the intervals, ...], one interval behind the other; a view where there is one."""
    if len(intervals) == 1:
        return tensor[slice(*intervals[0])]
    return torch.cat([tensor[slice(*interval)] for interval in intervals]) if intervals else tensor[:0]


def add_rows(total: Tensor, intervals: Sequence[Interval], values: Tensor) -> None:
    """The inverse of `rows_of`: add `values` [rows of the intervals, ...] to the rows of `total` [T, ...]."""
    offset = 0
    for start, stop in intervals:
        total[start:stop] += values[offset : offset + stop - start]
        offset += stop - start


class Forward:
    """Softmax attention, block by block: `out` [T, A, D] over the keys seen so far, and their log-sum-exp `lse` [T, A].

    Padding rows attend to nothing: zeros.
    """

    def __init__(self, kernel: FlashKernel, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan):
        """q [T, A, D], k and v [T, G, D]. Starts with the causal part: every run against itself."""
        self._kernel, self._q = kernel, q
        rows, lengths = plan.num_queries, plan.run_lengths
        self.out, self.lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=wide(q.dtype))
        if rows:
            keys, values = rows_of(k, plan.run_rows), rows_of(v, plan.run_rows)
            out, lse = kernel.forward(q[:rows], keys, values, lengths, lengths, causal=True)
            if rows == len(q):
                self.out, self.lse = out, lse
            else:
                self.out[:rows], self.lse[:rows] = out, lse

    def attend(self, k: Tensor, v: Tensor, slices: Sequence[QuerySlice]) -> None:
        """Take the keys and values [S, G, D] of a block into account."""
        for part in slices:
            keys, values, rows = rows_of(k, part.k), rows_of(v, part.k), slice(*part.q)
            q = self._q[rows]
            out, lse = self._kernel.forward(q, keys, values, (len(q),), (len(keys),), causal=False)
            if self.out.dtype != self.lse.dtype:
                self.out = self.out.to(self.lse.dtype)
            merge_(self.out[rows], self.lse[rows], out, lse)


def merge_(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Make (out, lse) the attention over both sets of keys, in place. Both out [T, A, D], both lse [T, A]."""
    total = torch.logaddexp(lse, more_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(
        more_out.to(out.dtype), (more_lse - total).exp_().unsqueeze(-1)
    )
    lse.copy_(total)


class Backward:
    """Its gradient, block by block: `dq` [T, A, D], and `dk`, `dv` [T, G, D] of this rank's own keys and values."""

    def __init__(
        self,
        kernel: FlashKernel,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: AttentionPlan,
    ):
        """grad, q and out [T, A, D], k and v [T, G, D], lse [T, A]; `out` and `lse` are the finished ones. Starts with
        the causal part."""
        self._kernel, self._grad, self._q, self._out, self._lse = kernel, grad, q, out, lse
        rows, lengths = plan.num_queries, plan.run_lengths
        self.dq, self.dk, self.dv = (t.new_zeros(t.shape, dtype=lse.dtype) for t in (q, k, v))
        if rows:
            grad, q, out, lse = (t[:rows] for t in (grad, q, out, lse))
            keys, values = rows_of(k, plan.run_rows), rows_of(v, plan.run_rows)
            dq, dk, dv = kernel.backward(grad, q, keys, values, out, lse, lengths, lengths, causal=True)
            self.dq[:rows] = dq
            add_rows(self.dk, plan.run_rows, dk)
            add_rows(self.dv, plan.run_rows, dv)

    def attend(self, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, slices: Sequence[QuerySlice]) -> None:
        """Take a block [S, G, D] into account; the gradients of its keys and values are added to `dk` and `dv`."""
        for part in slices:
            keys, values, rows = rows_of(k, part.k), rows_of(v, part.k), slice(*part.q)
            tensors = self._grad[rows], self._q[rows], keys, values, self._out[rows], self._lse[rows]
            lengths = (rows.stop - rows.start,), (len(keys),)
            dq, dkeys, dvalues = self._kernel.backward(*tensors, *lengths, causal=False)
            self.dq[rows] += dq
            add_rows(dk, part.k, dkeys)
            add_rows(dv, part.k, dvalues)
