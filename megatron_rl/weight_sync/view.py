# SPDX-License-Identifier: Apache-2.0
"""A weight sync's plan for people: one row per kind of rank, totals, the advised placement, one parameter's way."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_rl.weight_sync.cost import SyncCost
from megatron_rl.weight_sync.placement import ranks_in_order
from megatron_rl.weight_sync.plan import ReshardPlan, Transfer
from model_providers.weight_map import WeightMap

GB = 1e9
SHOWN_RANKS = 8  # longer lists of ranks end in their length


def report(usual: SyncCost, advised: SyncCost, placed: ReshardPlan, full_gather: float) -> Iterator[RenderableType]:
    """Ranks, totals, and what the advised placement changes."""
    yield _ranks_table(usual)
    yield Text(_totals(usual, full_gather))
    position = placed.engine_position
    if position == tuple(range(placed.engine.world)):
        yield Text("Placement: the usual order of ranks already keeps most bytes local.")
        return
    order = ranks_in_order(position)
    size = placed.engine.tensor
    replicas = [order[i : i + size] for i in range(0, placed.engine.world, size)]
    groups = " | ".join(" ".join(map(str, replica)) for replica in replicas[:SHOWN_RANKS])
    more = f" | ... ({len(replicas)} replicas; all in --json)" if len(replicas) > SHOWN_RANKS else ""
    yield Text(f"Placement: engine replicas of ranks ({groups}{more}) keep more bytes local:")
    yield Text(_totals(advised, full_gather))


def _totals(cost: SyncCost, full_gather: float) -> str:
    received = cost.received / GB
    mean = float(received.mean())
    ratio = f"{full_gather / GB / mean:.2f}x less" if mean else "nothing to move"
    return (
        f"  received per GPU {mean:.2f} GB on average, {received.max():.2f} at most, {received.sum():.2f} in all "
        f"(the minimum)\n"
        f"  full gather      {full_gather / GB:.2f} GB per GPU: {ratio}\n"
        f"  busiest link     {cost.seconds * 1e3:.1f} ms at the given speeds, without latencies"
    )


def _ranks_table(cost: SyncCost) -> Table:
    """Ranks whose printed numbers are equal share a row; what they send may differ a little and is a range."""
    rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, numbers in enumerate(zip(cost.need, cost.local, cost.received, strict=True)):
        rows[tuple(f"{number / GB:.2f}" for number in numbers)].append(rank)
    table = Table(caption="GB per rank", caption_justify="left")
    table.add_column("ranks", overflow="fold")
    for name in ("number", "need", "local", "received", "sent"):
        table.add_column(name, justify="right", overflow="fold")
    for shown, ranks in rows.items():
        sent = sorted({f"{value / GB:.2f}" for value in (cost.sent[ranks].min(), cost.sent[ranks].max())}, key=float)
        table.add_row(rank_list(ranks), str(len(ranks)), *shown, " to ".join(sent))
    return table


def rank_list(ranks: Sequence[int] | np.ndarray) -> str:
    """0-3 8 12; a long list ends in its length."""
    runs: list[list[int]] = []
    for rank in map(int, ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(words) > SHOWN_RANKS:
        return f"{' '.join(words[:SHOWN_RANKS])} ... ({len(ranks)} ranks)"
    return " ".join(words)


def explanation(plan: ReshardPlan, weights: WeightMap, name: str) -> list[RenderableType]:
    """Every interval of one parameter, by engine shard: who has it already, who gets it from whom."""
    entries = [e for e in weights.entries.values() if name in (e.mcore, e.engine, *(t.name for t in e.hf))]
    if not entries:
        raise ValueError(_unknown(weights, name))
    engine_names = {e.engine for e in entries}
    hf_names = {t.name for e in entries for t in e.hf}
    wanted = {name} if name in hf_names else hf_names
    shards: dict[tuple[str, int], list[Transfer]] = defaultdict(list)
    for transfer in plan.transfers:
        if transfer.engine in engine_names and transfer.target.hf in wanted:
            rank = int((*transfer.local, *transfer.receivers)[0])
            shards[transfer.engine, plan.engine_tp(rank)].append(transfer)
    return [_shard_table(engine, tp, found) for (engine, tp), found in sorted(shards.items())]


def _shard_table(engine: str, tp: int, transfers: Iterable[Transfer]) -> Table:
    table = Table(title=f"{engine}, engine shard {tp}", title_justify="left")
    for column in ("HF tensor", "rows", "columns", "already on", "sent: from -> to"):
        table.add_column(column, overflow="fold")
    for transfer in transfers:
        rows, cols = (f"{first}-{stop - 1}" for first, stop in (transfer.target.rows, transfer.target.cols))
        sent = [
            f"{sender} -> {rank_list(transfer.receivers[transfer.senders == sender])}"
            for sender in np.unique(transfer.senders)
        ]
        table.add_row(transfer.target.hf, rows, cols, rank_list(transfer.local), "\n".join(sent))
    return table


def _unknown(weights: WeightMap, name: str) -> str:
    names = {n for e in weights.entries.values() for n in (e.mcore, e.engine, *(t.name for t in e.hf))}
    close = [n for n in sorted(names) if name in n][:3] or difflib.get_close_matches(name, sorted(names), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "give the name of an HF, Megatron or vLLM parameter"
    return f"--explain={name}: no such parameter; {hint}"
