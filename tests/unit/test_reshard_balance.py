# SPDX-License-Identifier: Apache-2.0
"""No rank sends much more than it must: against the best split of the sending over the owners, found by max-flow."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace

import pytest

from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import ReshardPlan, build_plan
from model_providers.qwen2_5_vl.weights import weight_map
from model_providers.shape import RopeSettings, TransformerShape

SMALL = TransformerShape(
    num_layers=4,
    hidden_size=12,
    ffn_hidden_size=24,
    num_heads=6,
    num_groups=6,
    head_dim=2,
    vocab_size=384,
    rms_eps=1e-6,
    rope=RopeSettings(1e4, 2),
    qkv_bias=True,
    tied_embeddings=False,
    max_positions=64,
)
TWO_KV = replace(SMALL, hidden_size=16, num_heads=8, num_groups=2, vocab_size=320)
TIED = replace(TWO_KV, tied_embeddings=True)
QWEN_3B = replace(
    SMALL, num_layers=36, hidden_size=2048, ffn_hidden_size=11008, num_heads=16, num_groups=2, head_dim=128,
    vocab_size=151936, tied_embeddings=True,
)  # fmt: skip
QWEN_7B = replace(
    SMALL, num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_heads=28, num_groups=4, head_dim=128,
    vocab_size=152064,
)  # fmt: skip

CASES = [
    (SMALL, Grid(6, tensor=3, pipeline=2), Grid(6, tensor=2)),
    (SMALL, Grid(12, tensor=3, pipeline=2), Grid(12, tensor=2)),
    (SMALL, Grid(6, tensor=2), Grid(6, tensor=3)),
    (SMALL, Grid(12, tensor=3, pipeline=2, context=2), Grid(12, tensor=6)),
    (SMALL, Grid(8, pipeline=4), Grid(8, tensor=2)),
    (SMALL, Grid(8, pipeline=2, virtual=2), Grid(8, tensor=2)),
    (TWO_KV, Grid(4, tensor=4), Grid(4)),
    (TWO_KV, Grid(8, tensor=4), Grid(8, tensor=4)),
    (TWO_KV, Grid(8, pipeline=2, context=2), Grid(8, tensor=4)),
    (TWO_KV, Grid(8, tensor=2, pipeline=2), Grid(8)),
    (TWO_KV, Grid(16, tensor=2, pipeline=2), Grid(16, tensor=8)),
    (TIED, Grid(4, tensor=2, pipeline=2), Grid(4, tensor=4)),
    (TIED, Grid(8, pipeline=2), Grid(8, tensor=2)),
    (TIED, Grid(8, pipeline=4), Grid(8, tensor=2)),
    (TIED, Grid(16, tensor=2, pipeline=4), Grid(16)),
    (QWEN_3B, Grid(8, tensor=2, pipeline=2), Grid(8)),
    (QWEN_3B, Grid(8, pipeline=4), Grid(8, tensor=4)),
    (QWEN_3B, Grid(12, tensor=2, pipeline=3), Grid(12, tensor=2)),
    (QWEN_7B, Grid(8, tensor=4, pipeline=2), Grid(8, tensor=2)),
    (QWEN_7B, Grid(16, tensor=2, pipeline=2, context=2), Grid(16, tensor=4)),
    (QWEN_7B, Grid(16, pipeline=2), Grid(16, tensor=4)),
    (QWEN_7B, Grid(28, pipeline=7), Grid(28, tensor=4)),
]


def name_of(case: tuple[TransformerShape, Grid, Grid]) -> str:
    shape, trainer, engine = case
    sizes = (trainer.world, trainer.tensor, trainer.pipeline, trainer.context, engine.tensor)
    return f"{shape.hidden_size}-" + "-".join(map(str, sizes)) + "-tied" * shape.tied_embeddings


def demands_of(plan: ReshardPlan) -> dict[tuple[int, ...], int]:
    """Elements to send by the set of ranks that own them; any of them may send any part."""
    demands: dict[tuple[int, ...], int] = defaultdict(int)
    for transfer in plan.transfers:
        owners = tuple(sorted({int(rank) for holder in transfer.holders for rank in holder.ranks}))
        demands[owners] += transfer.numel * len(transfer.receivers)
    return demands


def max_flow(capacity: dict[object, dict[object, int]], source: object, sink: object) -> int:
    """Edmonds-Karp; changes `capacity` into what is left."""
    total = 0
    while True:
        parent: dict[object, object] = {source: source}
        queue = deque([source])
        while queue and sink not in parent:
            node = queue.popleft()
            for neighbour, left in capacity[node].items():
                if left > 0 and neighbour not in parent:
                    parent[neighbour] = node
                    queue.append(neighbour)
        if sink not in parent:
            return total
        path = [sink]
        while path[-1] != source:
            path.append(parent[path[-1]])
        edges = list(zip(path[1:], path, strict=False))
        pushed = min(capacity[a][b] for a, b in edges)
        for a, b in edges:
            capacity[a][b] -= pushed
            capacity[b][a] = capacity[b].get(a, 0) + pushed
        total += pushed


def least_possible_maximum(demands: dict[tuple[int, ...], int]) -> int:
    """The smallest bound on what one rank sends under which all demands can be met, by bisection."""
    total = sum(demands.values())

    def feasible(bound: int) -> bool:
        capacity: dict[object, dict[object, int]] = defaultdict(dict)
        for owners, elements in demands.items():
            capacity["source"][owners] = elements
            for rank in owners:
                capacity[owners][rank] = elements
                capacity[rank]["sink"] = bound
        return max_flow(capacity, "source", "sink") == total

    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(middle) else (middle + 1, high)
    return low


def test_the_oracle_on_a_case_by_hand() -> None:
    # Rank 0 alone must send 6; ranks 1 and 2 share the 8 that all three own.
    assert least_possible_maximum({(0,): 6, (0, 1, 2): 8}) == 6
    assert least_possible_maximum({(0,): 1, (0, 1, 2): 8}) == 3


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_busiest_sender_is_within_ten_percent_of_the_best_split(case: tuple[TransformerShape, Grid, Grid]) -> None:
    shape, *grids = case
    plan = build_plan(weight_map(shape), shape.num_layers, *grids)
    best = least_possible_maximum(demands_of(plan))
    assert best > 0
    assert plan.sent.max() <= 1.1 * best
