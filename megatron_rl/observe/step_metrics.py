# SPDX-License-Identifier: Apache-2.0
"""The numbers of one step, summed over ranks before they are divided. Names as in Long-RL where they mean the same."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rl.runtime.parallel import reduce_max
from megatron_rl.types import LossInputs, LossOutput, RolloutBatch, SyncReport

if TYPE_CHECKING:
    from megatron_rl.media.encoder import EncoderCounts
    from megatron_rl.protocols import PolicyLoss


class Totals:
    """Sums {name: (numerator, denominator)} over updates and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        for name, (numerator, denominator) in metrics.items():
            top, bottom = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (top + numerator, bottom + denominator)

    def reduced(self) -> dict[str, float]:
        """Quotients over the world. Collective."""
        everyone: list[dict[str, tuple[float, float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, self._sums)
        total = Totals()
        for sums in everyone:
            total.add(sums)
        return {name: top / bottom for name, (top, bottom) in total._sums.items() if bottom}


class MismatchMetric:
    """A policy loss that also remembers the largest |trainer - engine| log-probability of a sampled token, both at the
    weights that sampled it."""

    def __init__(self, loss: PolicyLoss):
        self._loss, self._largest = loss, 0.0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        if len(inputs.old_logprobs):
            self._largest = max(self._largest, float((inputs.old_logprobs - inputs.rollout_logprobs).abs().max()))
        return self._loss(inputs)

    def metrics(self) -> dict[str, float]:
        """Collective."""
        return {"rollout/logprob_gap_max": reduce_max(self._largest)}


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Rewards, lengths, truncation and informativeness of all sampled groups, and the weight sync before them. A part
    of the reward is averaged over the responses that have it. Collective."""
    groups, synced = batch.sampled, sync_metrics(batch.sync)
    scored = [s for group in groups for s in group.scored]
    if not scored:
        return {"rollout/num_groups": 0.0, **synced}
    metrics = {
        **_spread("critic/score", [s.reward for s in scored]),
        **_spread("response_length", [float(len(s.completion.token_ids)) for s in scored]),
        **_spread("prompt_length", [float(len(g.prompt.token_ids)) for g in groups]),
        "response_length/clip_ratio": statistics.fmean(float(s.completion.truncated) for s in scored),
        "rollout/num_groups": float(len(groups)),
        "rollout/dropped_groups": float(len(groups) - len(batch.kept)),
        "rollout/zero_variance_groups": statistics.fmean(float(len({s.reward for s in g.scored}) == 1) for g in groups),
    }
    for name in dict.fromkeys(name for s in scored for name in s.parts):
        metrics[f"reward/{name}"] = statistics.fmean(s.parts[name] for s in scored if name in s.parts)
    return metrics | synced


def sync_metrics(report: SyncReport | None) -> dict[str, float]:
    """Bytes moved by a weight sync over all ranks, against what had to move; {} when there was none. Collective."""
    if report is None:
        return {}
    reports: list[SyncReport] = [report] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    received, minimum = sum(r.received for r in reports), sum(r.minimum for r in reports)
    return {
        "sync/received_bytes": float(received),
        "sync/minimum_bytes": float(minimum),
        "sync/local_bytes": float(sum(r.copied_locally for r in reports)),
        "sync/bytes_over_minimum": bytes_over_minimum(received, minimum),
        "sync/max_sent_bytes": float(max(r.sent for r in reports)),
        "timing_s/reshard": max(r.seconds for r in reports),
    }


def media_metrics(counts: EncoderCounts | None, prefix: str = "vision") -> dict[str, float]:
    """What all ranks together encoded, read from the cache and received; `vision/max_encoded_patches` is the most that
    one rank encoded. {} where the model has no encoder (None, on all ranks). Collective."""
    if counts is None:
        return {}
    everyone: list[EncoderCounts] = [counts] * dist.get_world_size()
    dist.all_gather_object(everyone, counts)
    totals = {f"{prefix}/{f.name}": float(sum(getattr(c, f.name) for c in everyone)) for f in fields(counts)}
    return totals | {f"{prefix}/max_encoded_patches": float(max(c.encoded_patches for c in everyone))}


def bytes_over_minimum(received: int, minimum: int) -> float:
    """1.0 is the goal; also where nothing had to move and nothing did."""
    if minimum == 0:
        return 1.0 if received == 0 else float("inf")
    return received / minimum


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": statistics.fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}
