# SPDX-License-Identifier: Apache-2.0
"""What a weight sync costs: bytes per rank, the full gather it replaces, and seconds on given links."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import ReshardPlan, sources_by_engine_name
from model_providers.weight_map import WeightMap

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Links:
    """Speeds of one GPU's links in each direction, in bytes per second, and how many ranks share a node."""

    nvlink: float
    network: float
    ranks_per_node: int


@dataclass(frozen=True, slots=True)
class SyncCost:
    """Bytes per rank of one sync. need = local + received."""

    need: Counts
    local: Counts
    received: Counts
    sent: Counts
    seconds: float
    """How long the busiest link is busy: a bound from below, without latencies and copies."""


def cost_of(plan: ReshardPlan, bytes_per_element: int, links: Links) -> SyncCost:
    within, across = traffic(plan, links.ranks_per_node)
    nvlink_busy = int(within.max()) * bytes_per_element / links.nvlink
    network_busy = int(across.max()) * bytes_per_element / links.network
    return SyncCost(
        need=plan.needed * bytes_per_element,
        local=plan.local * bytes_per_element,
        received=plan.received * bytes_per_element,
        sent=plan.sent * bytes_per_element,
        seconds=max(nvlink_busy, network_busy),
    )


def traffic(plan: ReshardPlan, ranks_per_node: int) -> tuple[Counts, Counts]:
    """[sent or received, rank] in elements, first within nodes, then across."""
    totals = np.zeros((2, 2, plan.world), np.int64)
    for transfer in plan.transfers:
        is_across = transfer.senders // ranks_per_node != transfer.receivers // ranks_per_node
        for total, chosen in zip(totals, (~is_across, is_across), strict=True):
            np.add.at(total[0], transfer.senders[chosen], transfer.numel)
            np.add.at(total[1], transfer.receivers[chosen], transfer.numel)
    return totals[0], totals[1]


def model_elements(weights: WeightMap) -> int:
    """Elements of all distinct weights: tied ones once."""
    return sum(t.rows * t.cols for t in weights.hf_tensors().values())


def full_gather_elements(weights: WeightMap, num_layers: int, trainer: Grid) -> float:
    """What a trainer's rank receives, on average, when every rank builds the whole model: all that its shard lacks."""
    held = np.zeros(trainer.ranks.stop, np.int64)
    for sources in sources_by_engine_name(weights, num_layers, trainer).values():
        for entry, stage in sources:
            num_slots = trainer.num_slots(entry.layout.is_expert)
            for slot in range(num_slots):
                shard = entry.layout.trainer(entry.hf, slot, num_slots)
                ranks = np.array(trainer.ranks_of_slot(stage, slot, entry.layout.is_expert))
                held[ranks] += sum(block.numel for block in shard.blocks)
    return model_elements(weights) - float(held[trainer.first_rank :].mean())
