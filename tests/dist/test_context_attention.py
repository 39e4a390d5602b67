# SPDX-License-Identifier: Apache-2.0
"""Attention alone, in double precision, over context parallel ranks: every exchange, every shape, against a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model_providers.attention import core, exchange
from model_providers.attention.core import _attend_by_heads, _SoftmaxAttention
from model_providers.attention.kernels import AtenCpu
from model_providers.attention.segments import (
    Interval,
    Segment,
    block_size,
    plan_attention,
    plan_whole_attention,
    shard,
    shard_by_tokens,
)
from tests.attention_masks import mask_of, masked_attention, segments_of
from tests.world import run_world

TOLERANCE = 1e-10
PADDING = 3  # rows that every rank carries behind its own

SHAPES = {
    "shared": [(97, [9, 9, 14, 5]), (3, [4, 4])],
    "packed": [(61, []), (20, []), (7, [])],
    "both": [(120, [11] * 3), (33, []), (1, [1, 1])],
    "fewer tokens than ranks": [(2, [])],
}


@dataclass(frozen=True)
class Case:
    shape: str
    num_ranks: int
    comm: str
    heads: int = 4
    kv_heads: int = 2
    last_layer: bool = False
    """Only some tokens ask."""

    def __str__(self) -> str:
        heads = f"{self.heads}of{self.kv_heads}"
        return f"{self.shape}-{self.num_ranks}-{self.comm}-{heads}{'-last' * self.last_layer}".replace(" ", "_")


def _tensors(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    num_tokens = segments_of(SHAPES[case.shape])[-1].stop
    shapes = [(num_tokens, heads, 32) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _attend(rank: int, case: Case) -> list[tuple[list[int], Tensor]]:
    """out, dq, dk, dv, each with the packed positions of its rows."""
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(case.num_ranks)))
    segments = segments_of(SHAPES[case.shape])
    by_heads = case.comm == "a2a"
    shards = shard_by_tokens(segments, case.num_ranks) if by_heads else shard(segments, case.num_ranks, 0.01)
    queries = _asking(segments) if case.last_layer else None
    here = [t for run in shards[rank] for t in range(run.start, run.stop)]
    asking = [t for t in here if queries is None or any(start <= t < stop for start, stop in queries)]
    places = asking, here, here, asking  # of q, k, v, grad
    q, k, v, grad = (
        torch.nn.functional.pad(t[place], (0, 0, 0, 0, 0, PADDING), value=1.0).requires_grad_()
        for t, place in zip(_tensors(case), places, strict=True)
    )
    if by_heads:
        out = _attend_by_heads(AtenCpu(), q, k, v, plan_whole_attention(segments, shards, queries), group)
    else:
        plan = plan_attention(segments, shards, rank, queries)
        out = _SoftmaxAttention.apply(q, k, v, plan, AtenCpu(), case.comm, group)
    results = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]
    places = asking, asking, here, here  # of out, dq, dk, dv
    for t, place in zip(results, places, strict=True):
        assert torch.equal(t[len(place) :], torch.zeros_like(t[len(place) :])), "padding leaks"
    return list(zip(places, [t[: len(place)] for t, place in zip(results, places, strict=True)], strict=True))


def _asking(segments: Sequence[Segment]) -> list[Interval]:
    """The last token of what stands alone or is a prompt, and all but the last of what rides on one."""
    return [(s.stop - 1, s.stop) if s.prefix is None else (s.start, s.stop - 1) for s in segments]


CASES = [
    *[Case(shape, n, comm) for shape in SHAPES for n in (2, 4) for comm in ("all_gather", "p2p", "a2a")],
    *[Case("both", 3, comm, heads=6) for comm in ("all_gather", "p2p", "a2a")],  # 2 heads a rank of 3 groups each
    *[Case("both", n, comm, last_layer=True) for n in (1, 2, 4) for comm in ("all_gather", "p2p", "a2a")],
    Case("both", 4, "a2a", heads=4, kv_heads=1),
    Case("both", 2, "a2a", heads=8, kv_heads=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_a_mask(case: Case, heavy_imports: None) -> None:
    *qkv, grad = _tensors(case)
    q, k, v = (t.requires_grad_() for t in qkv)
    segments = segments_of(SHAPES[case.shape])
    out = masked_attention(q, k, v, mask_of(segments))
    if case.last_layer:
        asks = torch.zeros(len(out), 1, 1, dtype=torch.bool)
        for start, stop in _asking(segments):
            asks[start:stop] = True
        out = out * asks
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    nan = float("nan")
    missing = 0.0 if case.last_layer else nan
    found = [torch.full_like(t, fill) for t, fill in zip(expected, (missing, missing, nan, nan), strict=True)]
    for results in run_world(case.num_ranks, _attend, case):
        for total, (place, part) in zip(found, results, strict=True):
            total[place] = part
    for ours, truth in zip(found, expected, strict=True):
        assert float((ours - truth).abs().max()) <= TOLERANCE


def _count_bytes(rank: int, comm: str) -> tuple[int, int]:
    """(bytes of keys and values received in a forward, rows of other ranks' blocks)."""
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1, 2, 3])
    segments = segments_of([(400, [10] * 8), *[(12, [6, 6])] * 12])
    shards = shard(segments, 4, 0.01)
    plan = plan_attention(segments, shards, rank)
    rows = plan.rank_sizes[rank]
    q, k, v = torch.randn(rows, 4, 32), torch.randn(rows, 2, 32), torch.randn(rows, 2, 32)
    received = 0

    def gathered(output: Tensor, *args: object, **kwargs: object) -> object:
        nonlocal received
        received += output.nbytes * 3 // 4
        return all_gather(output, *args, **kwargs)

    def transfer(operation: object, tensor: Tensor, *args: object) -> object:
        nonlocal received
        received += tensor.nbytes if operation is dist.irecv else 0
        return p2p(operation, tensor, *args)

    all_gather, p2p = dist.all_gather_into_tensor, dist.P2POp
    with (
        mock.patch.object(exchange.dist, "all_gather_into_tensor", gathered),
        mock.patch.object(exchange.dist, "P2POp", transfer),
    ):
        core._SoftmaxAttention.apply(q, k, v, plan, AtenCpu(), comm, group)
    others = sum(block_size(exports) for origin, exports in enumerate(plan.exports) if origin != rank)
    return received, others


def test_only_what_others_need_travels(heavy_imports: None) -> None:
    """The long prompt's keys, not those of the short groups beside it, each held whole by one rank."""
    row_bytes = 2 * 2 * 32 * 4
    for received, others in run_world(4, _count_bytes, "p2p"):
        assert received == others * row_bytes
        assert others <= 400
    for received, others in run_world(4, _count_bytes, "all_gather"):
        assert others * row_bytes <= received <= 1.2 * others * row_bytes  # blocks padded to the longest
