# SPDX-License-Identifier: Apache-2.0
"""How the keys and values of other context parallel ranks come here: `Exchange` variants, and all-to-all over heads.

Only rows that another rank attends to are sent (`AttentionPlan.exports`): for a sequence that one rank holds whole,
nothing. What was received is not kept for the backward, which fetches it again: kept, it would undo the saving of
activation memory that context parallelism is for.

Shapes: types.py; a block is [S, 2, G, D], keys and values together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model_providers.attention.blockwise import add_rows, rows_of
from model_providers.attention.segments import AttentionPlan, block_size

KEY_VALUE_TAG, GRADIENT_TAG = 1, 2  # gloo matches messages by tag; NCCL by order


class Exchange(ABC):
    """Fetches the blocks of the other ranks, and returns their gradients to them."""

    def __init__(self, plan: AttentionPlan, group: dist.ProcessGroup):
        self._plan, self._group = plan, group
        self._rank, self._size = group.rank(), group.size()
        self._sizes = [block_size(exports) for exports in plan.exports]

    def own_block(self, k: Tensor, v: Tensor) -> Tensor:
        """[S, 2, G, D]: what others need of this rank's keys and values [T, G, D]."""
        exports = self._plan.exports[self._rank]
        return torch.stack([rows_of(k, exports), rows_of(v, exports)], dim=1)

    @abstractmethod
    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its block [S, 2, G, D]) of every other rank that has one."""

    @abstractmethod
    def blocks_and_gradients(self, own: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(rank, its block [S, 2, G, D], zeros [S, 2, G, D] in `dtype` to which the caller adds its gradient). When the
        iterator is exhausted, `gradient` [S, 2, G, D] holds the sum, over all ranks, of the gradients of this rank's
        own block."""

    gradient: Tensor


class AllGather(Exchange):
    """Every block on every rank at once: one collective a direction, and the memory of all blocks of one layer."""

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        if max(self._sizes) == 0:
            return
        gathered = self._gather(own)
        for rank, size in enumerate(self._sizes):
            if rank != self._rank and size:
                yield rank, gathered[rank, :size]

    def blocks_and_gradients(self, own: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        self.gradient = torch.zeros_like(own, dtype=dtype)
        if max(self._sizes) == 0:
            return
        gathered = self._gather(own)
        gradients = torch.zeros_like(gathered, dtype=dtype)
        for rank, size in enumerate(self._sizes):
            if rank != self._rank and size:
                yield rank, gathered[rank, :size], gradients[rank, :size]
        del gathered
        mine = torch.empty_like(gradients[0])
        dist.reduce_scatter_tensor(mine, gradients.flatten(0, 1), group=self._group)
        self.gradient = mine[: len(own)]

    def _gather(self, own: Tensor) -> Tensor:
        """[ranks, longest block, 2, G, D]; shorter blocks are padded at the end."""
        padded = own.new_zeros(max(self._sizes), *own.shape[1:])
        padded[: len(own)] = own
        gathered = own.new_empty(self._size * len(padded), *own.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        return gathered.unflatten(0, (self._size, -1))


class Ring(Exchange):
    """Each rank sends blocks to the next one; a block is received while the one before it is computed with.

    Ring attention (Liu et al. 2023, arXiv 2310.01889): memory of two blocks. In the backward the gradient of a
    block is sent after it; every rank adds to it, and the last hop returns it to the block's owner.
    """

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        block = own
        transfer = self._pass_on(block, 0)
        for hop in range(1, self._size):
            block = transfer.wait()
            if hop < self._size - 1:
                transfer = self._pass_on(block, hop)
            origin = self._origin(hop)
            if self._sizes[origin]:
                yield origin, block

    def blocks_and_gradients(self, own: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        block = own
        transfer = self._pass_on(block, 0)
        arriving: _Transfer | None = None  # what the ranks before this one added for the next block
        for hop in range(1, self._size):
            block = transfer.wait()
            if hop < self._size - 1:
                transfer = self._pass_on(block, hop)
            gradient = torch.zeros_like(block, dtype=dtype)
            origin = self._origin(hop)
            if self._sizes[origin]:
                yield origin, block, gradient
            if arriving is not None:
                gradient += arriving.wait()
            arriving = self._pass_on(gradient, hop, GRADIENT_TAG)
        self.gradient = arriving.wait() if arriving is not None else torch.zeros_like(own, dtype=dtype)

    def _origin(self, hop: int) -> int:
        return (self._rank - hop) % self._size

    def _pass_on(self, block: Tensor, hop: int, tag: int = KEY_VALUE_TAG) -> _Transfer:
        """Send the block that has come `hop` hops to the next rank, and receive the previous rank's."""
        arriving = block.new_empty(self._sizes[self._origin(hop + 1)], *block.shape[1:])
        neighbours = (self._rank + 1) % self._size, (self._rank - 1) % self._size
        after, before = (dist.get_global_rank(self._group, rank) for rank in neighbours)
        operations = []
        if len(block):
            operations.append(dist.P2POp(dist.isend, block, after, self._group, tag))
        if len(arriving):
            operations.append(dist.P2POp(dist.irecv, arriving, before, self._group, tag))
        return _Transfer(block, arriving, dist.batch_isend_irecv(operations) if operations else [])


class _Transfer:
    """A block that is being sent and one that is being received. Keeps both tensors until that is done."""

    def __init__(self, leaving: Tensor, arriving: Tensor, works: Sequence[dist.Work]):
        self._leaving, self._arriving, self._works = leaving, arriving, works

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._arriving


EXCHANGES: dict[str, type[Exchange]] = {"all_gather": AllGather, "p2p": Ring}


def add_own_gradient(dk: Tensor, dv: Tensor, gradient: Tensor, plan: AttentionPlan, rank: int) -> None:
    """Add the gradient [S, 2, G, D] of this rank's block to those of its rows."""
    add_rows(dk, plan.exports[rank], gradient[:, 0])
    add_rows(dv, plan.exports[rank], gradient[:, 1])


# --------------------------------------------------------------------------------------------- all-to-all over heads


def heads_of_rank(num_heads: int, num_kv_heads: int, rank: int, size: int) -> tuple[range, list[int]]:
    """(heads, key/value heads) with which `rank` computes. Where there are fewer key/value heads than ranks, several
    ranks get the same one; where a rank's heads share them unevenly, each head brings its own copy."""
    per_rank, per_kv = num_heads // size, num_heads // num_kv_heads
    heads = range(rank * per_rank, (rank + 1) * per_rank)
    owners = [head // per_kv for head in heads]
    distinct = sorted(set(owners))
    even = len({owners.count(kv) for kv in distinct}) == 1
    return heads, distinct if even else owners


class TokensToHeads(torch.autograd.Function):
    """All heads of this rank's rows [T, A, D] -> some heads of the rows of all ranks [rows, heads, D] (Ulysses, Jacobs
    et al. 2023, arXiv 2309.14509). `chosen[r]`: heads that rank r gets."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: Sequence[Sequence[int]], row_counts: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.chosen, ctx.row_counts, ctx.group, ctx.shape = chosen, row_counts, group, x.shape
        leaving = torch.cat([x[:, list(heads)].flatten() for heads in chosen])
        mine, width = len(chosen[group.rank()]), x.shape[-1]
        sent = [len(x) * len(heads) * width for heads in chosen]
        received = [count * mine * width for count in row_counts]
        return _all_to_all(leaving, sent, received, group).view(-1, mine, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        num_rows, _, width = ctx.shape
        mine = len(ctx.chosen[ctx.group.rank()])
        sent = [count * mine * width for count in ctx.row_counts]
        received = [num_rows * len(heads) * width for heads in ctx.chosen]
        parts = _all_to_all(grad.flatten(), sent, received, ctx.group).split(received)
        total = grad.new_zeros(ctx.shape)
        for heads, part in zip(ctx.chosen, parts, strict=True):
            for place, head in enumerate(heads):
                total[:, head] += part.view(num_rows, len(heads), width)[:, place]
        return total, None, None, None


class HeadsToTokens(torch.autograd.Function):
    """The inverse: some heads of the rows of all ranks [rows, heads, D] -> all heads [T, A, D] of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_heads: int, row_counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.row_counts, ctx.group, ctx.shape = row_counts, group, x.shape
        own_rows = row_counts[group.rank()]
        _, mine, width = x.shape
        sent = [count * mine * width for count in row_counts]
        received = [own_rows * mine * width] * group.size()
        arrived = _all_to_all(x.flatten(), sent, received, group)
        return arrived.view(group.size(), own_rows, mine, width).transpose(0, 1).reshape(own_rows, num_heads, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, mine, width = ctx.shape
        own_rows, size = len(grad), ctx.group.size()
        leaving = grad.view(own_rows, size, mine, width).transpose(0, 1).reshape(-1)
        received = [count * mine * width for count in ctx.row_counts]
        arrived = _all_to_all(leaving, [own_rows * mine * width] * size, received, ctx.group)
        return arrived.view(ctx.shape), None, None, None


def _all_to_all(leaving: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    arriving = leaving.new_empty(sum(received))
    dist.all_to_all_single(arriving, leaving, list(received), list(sent), group=group)
    return arriving
