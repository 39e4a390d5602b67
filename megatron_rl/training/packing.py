# SPDX-License-Identifier: Apache-2.0
"""Which samples are computed together: bundles that share a prompt, packed into micro-batches of a token budget,
balanced over data parallel ranks by cost.

Every rank computes the same plan from the same samples. All data parallel ranks get equally many micro-batches; one
may be empty (padding only) where there are fewer bundles than micro-batches.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.types import TrainSample

Bin = tuple[tuple[int, ...], ...]  # the bundles of one micro-batch


@dataclass(frozen=True, slots=True)
class Bundle:
    """Samples (`members`, indices) with one prompt, which is stored and computed once, and its responses; lengths in
    tokens. `cost` is in units of one token's linear layers.

    Example: Bundle((0, 1), 100, (20, 30), cost=151.7), two responses to a prompt of 100 tokens at H = 1024
    """

    members: tuple[int, ...]
    prompt_length: int
    response_lengths: tuple[int, ...]
    cost: float

    @property
    def num_tokens(self) -> int:
        return self.prompt_length + sum(self.response_lengths)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """`bins[dp][microbatch]`: the bundles of a micro-batch of a data parallel rank, as tuples of sample indices."""

    bins: tuple[tuple[Bin, ...], ...]


def attention_weight(hidden_size: int) -> float:
    """Work of attending to one token, in units of one token's linear layers.

    A layer costs a token about 24 * H**2 FLOPs in its linears and 4 * H for each token that it attends to.
    """
    return 1.0 / (6.0 * hidden_size)


def bundle_cost(prompt: int, responses: Sequence[int], hidden_size: int) -> float:
    """Work of a prompt and its responses (lengths in tokens), the prompt computed once."""
    tokens = prompt + sum(responses)
    attended = prompt**2 / 2 + sum(prompt * r + r**2 / 2 for r in responses)
    return tokens + attention_weight(hidden_size) * attended


def build_bundles(
    samples: Sequence[TrainSample], max_tokens: int, hidden_size: int, share_prefix: bool
) -> list[Bundle]:
    """Neighbouring samples of one prompt, as many as fit into `max_tokens`; one sample each without sharing."""
    bundles = []
    for _, group in itertools.groupby(range(len(samples)), key=lambda i: samples[i].prompt.prompt_id):
        prompt_length, num_tokens = 0, 0
        members: list[int] = []
        for index in group:
            sample = samples[index]
            prompt_length, response = len(sample.prompt.token_ids), len(sample.response_ids)
            if members and (not share_prefix or num_tokens + response > max_tokens):
                bundles.append(_bundle(samples, members, hidden_size))
                members = []
            if not members:
                num_tokens = prompt_length
            members.append(index)
            num_tokens += response
        bundles.append(_bundle(samples, members, hidden_size))
    return bundles


def _bundle(samples: Sequence[TrainSample], members: Sequence[int], hidden_size: int) -> Bundle:
    prompt = len(samples[members[0]].prompt.token_ids)
    responses = tuple(len(samples[i].response_ids) for i in members)
    return Bundle(tuple(members), prompt, responses, bundle_cost(prompt, responses, hidden_size))


def plan_packing(bundles: Sequence[Bundle], num_ranks: int, max_tokens: int, multiple: int = 1) -> PackPlan:
    """Fewest micro-batches per rank that respect `max_tokens`; their costs are evened out by longest-first greedy
    assignment.

    Their number is a multiple of `multiple`: the interleaved pipeline schedule wants one of the pipeline size.
    """
    too_long = [b.num_tokens for b in bundles if b.num_tokens > max_tokens]
    if too_long:
        raise ValueError(
            f"train.max_tokens_per_microbatch={max_tokens}: {len(too_long)} sequences are longer (up to "
            f"{max(too_long)} tokens); raise it or lower data.max_prompt_tokens / rollout.max_response_tokens"
        )
    fewest = max(1, -(-sum(b.num_tokens for b in bundles) // (max_tokens * num_ranks)))
    for per_rank in itertools.count(-(-fewest // multiple) * multiple, multiple):
        bins = _fill(bundles, num_ranks * per_rank, max_tokens)
        if bins is not None:
            return PackPlan(_assign(bins, num_ranks, per_rank))
    raise AssertionError("unreachable: one bundle a bin always fits")


def _fill(bundles: Sequence[Bundle], num_bins: int, max_tokens: int) -> list[list[Bundle]] | None:
    """Longest first, each into the cheapest bin with room; None when one does not fit."""
    bins: list[list[Bundle]] = [[] for _ in range(num_bins)]
    tokens, costs = [0] * num_bins, [0.0] * num_bins
    for bundle in sorted(bundles, key=lambda b: (-b.num_tokens, b.members)):
        room = [i for i in range(num_bins) if tokens[i] + bundle.num_tokens <= max_tokens]
        if not room:
            return None
        best = min(room, key=lambda i: (costs[i], i))
        bins[best].append(bundle)
        tokens[best] += bundle.num_tokens
        costs[best] += bundle.cost
    return bins


def _assign(bins: list[list[Bundle]], num_ranks: int, per_rank: int) -> tuple[tuple[Bin, ...], ...]:
    """Assign `per_rank` bins to every rank, the most expensive bin first, each to the rank with the least work."""

    def cost(members: list[Bundle]) -> float:
        return sum(bundle.cost for bundle in members)

    assigned: list[list[Bin]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for members in sorted(bins, key=cost, reverse=True):
        load, rank = heapq.heappop(heap)
        assigned[rank].append(tuple(bundle.members for bundle in members))
        if len(assigned[rank]) < per_rank:
            heapq.heappush(heap, (load + cost(members), rank))
    return tuple(tuple(bins_of_rank) for bins_of_rank in assigned)
