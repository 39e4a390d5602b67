# SPDX-License-Identifier: Apache-2.0
"""Moves weights from Megatron's shards into vLLM's live parameters, shard to shard.

Nothing is gathered: a rank receives the bytes its engine shard needs and does not hold, in the engine's dtype, and
writes them in place. Large rectangles travel alone and, where they are contiguous, from and into the parameters
themselves; small ones are coalesced per pair of ranks. No rank stages more than `buffer_bytes` at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import WeightMismatch
from megatron_rl.types import SyncReport
from megatron_rl.weight_sync.plan import ReshardPlan, Transfer
from model_providers.weight_map import Block

ALONE_BYTES = 1 << 20  # a rectangle at least this large is a message of its own


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle as this rank sees it: of a trainer parameter when sent, of an engine parameter when received."""

    name: str
    block: Block


@dataclass(frozen=True, slots=True)
class WeightMessage:
    """What travels between this rank and `peer` in one flat tensor; both ends list the parts in the same order."""

    peer: int
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return sum(p.block.numel for p in self.parts)


@dataclass(frozen=True, slots=True)
class Round:
    """Messages that are in flight together."""

    sends: tuple[WeightMessage, ...]
    receives: tuple[WeightMessage, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A plan as one rank executes it."""

    copies: tuple[tuple[Part, Part], ...]
    rounds: tuple[Round, ...]
    needed: int
    local: int


class Resharder:
    """Executes one plan, again and again. `source` and `target` are {name: live tensor} of this rank.

    `frozen` names engine parameters whose weights do not change in training: they are sent once, and again after
    `frozen_changed`. `source` is empty on a rank that does not train; on one without an engine `target` is, and
    `dtype` must tell the engine's type. `link` is the group of all ranks of both grids (None: the default group).
    """

    def __init__(
        self,
        plan: ReshardPlan,
        rank: int,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        buffer_bytes: int,
        frozen: frozenset[str] = frozenset(),
        dtype: torch.dtype | None = None,
        link: dist.ProcessGroup | None = None,
    ):
        self._plan, self._rank = plan, rank
        self._source, self._target = source, target
        self._dtype = dtype or next(iter(target.values())).dtype
        self._link = link
        buffer_numel = max(1, buffer_bytes // self._dtype.itemsize)
        alone = ALONE_BYTES // self._dtype.itemsize
        self._whole = build_script(plan, rank, buffer_numel, alone)
        self._trained = build_script(plan.without(frozen), rank, buffer_numel, alone) if frozen else self._whole
        self._padded = _partly_covered(plan, rank, target)
        self._frozen_sent = False

    def frozen_changed(self) -> None:
        """The frozen parameters were given other weights (a checkpoint was loaded): send them with the next sync."""
        self._frozen_sent = False

    @torch.no_grad()
    def sync(self, version: int, verify: bool = False) -> SyncReport:
        """Write the trainer's weights of `version` into the engine's parameters. Collective over the world.

        `verify` compares checksums of every rectangle afterwards; WeightMismatch names those that differ.
        """
        start = time.perf_counter()
        script = self._trained if self._frozen_sent else self._whole
        if not self._frozen_sent:
            for name in self._padded:
                self._target[name].zero_()  # vLLM's loader leaves zeros in the vocabulary padding
        for source, target in script.copies:
            _view(self._target, target).copy_(_view(self._source, source))
        for round_ in script.rounds:
            self._exchange(round_)
        self._frozen_sent = True
        if verify:
            self._verify()
        size = self._dtype.itemsize
        return SyncReport(
            version=version,
            received=sum(m.numel for r in script.rounds for m in r.receives) * size,
            sent=sum(m.numel for r in script.rounds for m in r.sends) * size,
            minimum=(script.needed - script.local) * size,
            copied_locally=script.local * size,
            seconds=time.perf_counter() - start,
        )

    def _exchange(self, round_: Round) -> None:
        operations = [dist.P2POp(dist.isend, self._outgoing(m), m.peer, group=self._link) for m in round_.sends]
        incoming = [(m, self._landing(m)) for m in round_.receives]
        operations += [dist.P2POp(dist.irecv, flat, m.peer, group=self._link) for m, flat in incoming]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for message, flat in incoming:
            if not self._lands_in_place(message):
                self._scatter(message, flat)

    def _outgoing(self, message: WeightMessage) -> Tensor:
        """The parts as one flat tensor in engine dtype: converted here, so that nothing wider travels."""
        parts = [_view(self._source, part).to(self._dtype).reshape(-1) for part in message.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _landing(self, message: WeightMessage) -> Tensor:
        if self._lands_in_place(message):
            return _view(self._target, message.parts[0]).view(-1)
        return next(iter(self._target.values())).new_empty(message.numel)

    def _lands_in_place(self, message: WeightMessage) -> bool:
        return len(message.parts) == 1 and _view(self._target, message.parts[0]).is_contiguous()

    def _scatter(self, message: WeightMessage, flat: Tensor) -> None:
        offset = 0
        for part in message.parts:
            _view(self._target, part).copy_(flat[offset : offset + part.block.numel].view(part.block.shape))
            offset += part.block.numel

    def _verify(self) -> None:
        """Compare the checksum of each rectangle at one of its holders with that of every engine shard that has it."""
        sums = {
            index: _checksum(_view(self._source, Part(*transfer.source_on(self._rank))).to(self._dtype))
            for index, transfer in enumerate(self._plan.transfers)
            if transfer.holders[0].ranks[0] == self._rank
        }
        everyone: list[dict[int, int]] = [{} for _ in range(self._plan.world)]
        dist.all_gather_object(everyone, sums, group=self._link)
        truth = {index: value for found in everyone for index, value in found.items()}
        wrong = [
            f"{transfer.engine}, {transfer.target.hf} rows {transfer.target.rows} columns {transfer.target.cols}"
            for index, transfer in enumerate(self._plan.transfers)
            if self._rank in transfer.receivers or self._rank in transfer.local
            if _checksum(_view(self._target, Part(transfer.engine, transfer.target))) != truth[index]
        ]
        found: list[list[str]] = [[] for _ in range(self._plan.world)]
        dist.all_gather_object(found, wrong, group=self._link)
        problems = [f"rank {rank}: {text}" for rank, texts in enumerate(found) for text in texts]
        if problems:
            raise WeightMismatch("the engine's weights differ after a sync:\n  " + "\n  ".join(problems[:50]))


def _view(tensors: Mapping[str, Tensor], part: Part) -> Tensor:
    """A rectangle of a live parameter. Vectors are one column; more dimensions are rows of the last one."""
    tensor = tensors[part.name]
    matrix = tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.flatten(0, -2)
    return matrix[part.block.local_slices]


def _checksum(tensor: Tensor) -> int:
    """Sum of the bytes as integers, each weighted by its place: also sees elements that were swapped."""
    data = tensor.contiguous().view(torch.uint8).flatten().to(torch.int64)
    return int((data * (torch.arange(data.numel(), device=data.device) % 65_521 + 1)).sum())


def _partly_covered(plan: ReshardPlan, rank: int, target: Mapping[str, Tensor]) -> list[str]:
    covered = dict.fromkeys(target, 0)
    for transfer in plan.transfers:
        if rank in transfer.receivers or rank in transfer.local:
            covered[transfer.engine] += transfer.numel
    return [name for name, numel in covered.items() if numel < target[name].numel()]


def build_script(plan: ReshardPlan, rank: int, buffer_numel: int, alone_numel: int) -> Script:
    """This rank's part of the plan, with messages divided into rounds of bounded staging.

    Every rank walks the transfers of the world in the same order, so that both ends of a message agree on its round.
    """
    copies = [
        (Part(*transfer.source_on(rank)), Part(transfer.engine, transfer.target))
        for transfer in plan.transfers
        if rank in transfer.local
    ]
    rounds = [_round(group, rank, alone_numel) for group in _rounds(plan.transfers, plan.world, buffer_numel)]
    local = sum(target.block.numel for _, target in copies)
    return Script(tuple(copies), tuple(r for r in rounds if r.sends or r.receives), int(plan.needed[rank]), local)


def _rounds(transfers: Sequence[Transfer], world: int, buffer_numel: int) -> Iterator[list[Transfer]]:
    """Groups of transfers for which no rank stages (sends plus receives) more than `buffer_numel` elements."""
    staged = np.zeros(world, np.int64)
    group: list[Transfer] = []
    for whole in transfers:
        if not len(whole.receivers):
            continue
        most_copies = int(np.unique(whole.senders, return_counts=True)[1].max())
        for part in whole.split(max(1, buffer_numel // (most_copies + 1))):
            added = np.bincount(part.senders, minlength=world) + np.bincount(part.receivers, minlength=world)
            added *= part.numel
            if group and (staged + added).max() > buffer_numel:
                yield group
                staged[:], group = 0, []
            staged += added
            group.append(part)
    if group:
        yield group


def _round(transfers: Sequence[Transfer], rank: int, alone_numel: int) -> Round:
    sends: dict[tuple[int, int], list[Part]] = {}
    receives: dict[tuple[int, int], list[Part]] = {}
    for index, transfer in enumerate(transfers):
        key = index + 1 if transfer.numel >= alone_numel else 0  # 0: coalesced with the other small ones
        for receiver in transfer.receivers[transfer.senders == rank]:
            sends.setdefault((int(receiver), key), []).append(Part(*transfer.source_on(rank)))
        for sender in transfer.senders[transfer.receivers == rank]:
            receives.setdefault((int(sender), key), []).append(Part(transfer.engine, transfer.target))
    return Round(_messages(sends), _messages(receives))


def _messages(parts: Mapping[tuple[int, int], list[Part]]) -> tuple[WeightMessage, ...]:
    """In order of (peer, key) at both ends: messages of a pair match by their order."""
    return tuple(WeightMessage(peer, tuple(parts[peer, key])) for peer, key in sorted(parts))
