# SPDX-License-Identifier: Apache-2.0
"""Moves weights from Megatron's shards into vLLM's live parameters, shard to shard.

Nothing is gathered: a rank receives the bytes its engine shard needs and does not hold, in the engine's dtype, and
writes them in place. Messages are coalesced per pair of ranks and travel in rounds of at most `buffer_bytes` a rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import WeightMismatch
from megatron_rl.rollout.reshard_plan import Move, ReshardPlan
from megatron_rl.types import SyncReport
from model_providers.weight_map import WeightMap


@dataclass(frozen=True, slots=True)
class Message:
    """Moves between this rank and `peer` that travel as one flat tensor."""

    peer: int
    moves: tuple[Move, ...]

    @property
    def numel(self) -> int:
        return sum(m.source.numel for m in self.moves)


class Resharder:
    """Executes one plan, again and again. `source` and `target` are {name: live tensor} of this rank."""

    def __init__(
        self,
        plan: ReshardPlan,
        rank: int,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        buffer_bytes: int,
    ):
        self._plan, self._rank = plan, rank
        self._source, self._target = source, target
        self._local = [m for m in plan.moves if m.sender == m.receiver == rank]
        self._dtype = next(iter(target.values())).dtype
        self._rounds = list(_rounds(plan, rank, max(1, buffer_bytes // self._dtype.itemsize)))
        self._padded = _partly_covered(plan, rank, target)

    @torch.no_grad()
    def sync(self, version: int) -> SyncReport:
        """Write the trainer's weights of `version` into the engine's parameters. Collective over the world."""
        start = time.perf_counter()
        for name in self._padded:
            self._target[name].zero_()  # vLLM's loader leaves zeros in the vocabulary padding
        for move in self._local:
            self._write(move, self._read(move))
        received = sent = 0
        for sends, receives in self._rounds:
            sent += sum(m.numel for m in sends)
            received += sum(m.numel for m in receives)
            self._exchange(sends, receives)
        size = self._dtype.itemsize
        local = self._plan.local(self._rank)
        return SyncReport(
            version=version,
            received=received * size,
            sent=sent * size,
            minimum=(self._plan.needed[self._rank] - local) * size,
            copied_locally=local * size,
            seconds=time.perf_counter() - start,
        )

    def _exchange(self, sends: list[Message], receives: list[Message]) -> None:
        like = next(iter(self._target.values()))
        outgoing = [(m.peer, torch.cat([self._read(move).reshape(-1) for move in m.moves])) for m in sends]
        incoming = [(m, like.new_empty(m.numel)) for m in receives]
        operations = [dist.P2POp(dist.isend, flat, peer) for peer, flat in outgoing]
        operations += [dist.P2POp(dist.irecv, flat, message.peer) for message, flat in incoming]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for message, flat in incoming:
            offset = 0
            for move in message.moves:
                self._write(move, flat[offset : offset + move.target.numel].view(move.target.shape))
                offset += move.target.numel

    def _read(self, move: Move) -> Tensor:
        """The piece in engine dtype: converted by the sender, so that nothing wider travels."""
        return _as_matrix(self._source[move.mcore])[move.source.local_slices].to(self._dtype)

    def _write(self, move: Move, piece: Tensor) -> None:
        _as_matrix(self._target[move.engine])[move.target.local_slices].copy_(piece)


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor


def _partly_covered(plan: ReshardPlan, rank: int, target: Mapping[str, Tensor]) -> list[str]:
    covered = dict.fromkeys(target, 0)
    for move in plan.moves:
        if move.receiver == rank:
            covered[move.engine] += move.target.numel
    return [name for name, numel in covered.items() if numel < target[name].numel()]


def _rounds(plan: ReshardPlan, rank: int, max_numel: int) -> Iterator[tuple[list[Message], list[Message]]]:
    """Cut all moves of the world into rounds in which no rank sends or receives more than `max_numel` elements.

    Every rank walks the same list, so that both ends of a message agree on the round. A single piece larger than the
    bound travels alone.
    """
    sending: dict[int, int] = {}
    receiving: dict[int, int] = {}
    current: list[Move] = []
    for move in plan.moves:
        if move.sender == move.receiver:
            continue
        full = (
            sending.get(move.sender, 0) + move.source.numel > max_numel
            or receiving.get(move.receiver, 0) + move.target.numel > max_numel
        )
        if full and current:
            yield _messages(current, rank)
            sending, receiving, current = {}, {}, []
        sending[move.sender] = sending.get(move.sender, 0) + move.source.numel
        receiving[move.receiver] = receiving.get(move.receiver, 0) + move.target.numel
        current.append(move)
    if current:
        yield _messages(current, rank)


def _messages(moves: list[Move], rank: int) -> tuple[list[Message], list[Message]]:
    sends: dict[int, list[Move]] = {}
    receives: dict[int, list[Move]] = {}
    for move in moves:
        if move.sender == rank:
            sends.setdefault(move.receiver, []).append(move)
        if move.receiver == rank:
            receives.setdefault(move.sender, []).append(move)
    return (
        [Message(peer, tuple(m)) for peer, m in sends.items()],
        [Message(peer, tuple(m)) for peer, m in receives.items()],
    )


def check_fit(
    weights: WeightMap,
    trainer_tp: int,
    tensor: int,
    engine_tp: int,
    rollout_tensor: int,
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
) -> None:
    """Raise one WeightMismatch that lists every parameter that is missing, unknown or misshapen on either side."""
    problems = []
    engine_entries = weights.engine_entries()
    for name in sorted(target.keys() ^ engine_entries.keys()):
        side = "the weight table" if name in target else "the engine"
        problems.append(f"{name}: not in {side}")
    for name in sorted(target.keys() & engine_entries.keys()):
        entry = engine_entries[name]
        expected = entry.layout.engine(entry.hf, engine_tp, rollout_tensor).shape
        if tuple(target[name].shape) != expected:
            problems.append(f"{name}: the engine has shape {list(target[name].shape)}, expected {list(expected)}")
    for name, tensor_ in source.items():
        entry = weights[name]
        expected = entry.layout.trainer(entry.hf, trainer_tp, tensor).shape
        if tuple(tensor_.shape) != expected:
            problems.append(f"{name}: the trainer has shape {list(tensor_.shape)}, expected {list(expected)}")
    if problems:
        raise WeightMismatch("trainer and engine weights do not fit:\n  " + "\n  ".join(problems))
