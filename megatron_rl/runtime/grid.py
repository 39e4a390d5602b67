# SPDX-License-Identifier: Apache-2.0
"""Which rank holds what: one grid for the trainer, one for the engine, over the same ranks or over different ones.

trainer   first_rank + arange(world).view(pp, dp, cp, tp)     Megatron-core's order "tp-cp-dp-pp"
experts   first_rank + arange(world).view(pp, edp, ep, etp)   Megatron-core's order "tp-ep-dp-pp"
engine    first_rank + arange(world).view(replica, tp)        vLLM's order: the tensor parallel ranks are consecutive

Arithmetic only: no torch, no communication. The rules for sizes, against ranks and against a model, are here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model_providers.shape import TransformerShape


@dataclass(frozen=True, slots=True)
class GridCoord:
    """Place of one rank in a grid. In an engine's grid `dp` is the number of the replica."""

    tp: int
    pp: int
    dp: int
    cp: int


@dataclass(frozen=True, slots=True)
class GridProblem:
    """A size, or the product of several, that a grid cannot have: fields of Grid, their value, why and a fix."""

    sizes: tuple[str, ...]
    value: int | str
    why: str

    def told(self, prefix: str, names: Mapping[str, str], times: str = " * ") -> str:
        """In the words of whoever set the sizes: `prefix` and `names[field]`, or the field's own name."""
        return f"{prefix}{times.join(names.get(size, size) for size in self.sizes)}={self.value}: {self.why}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of one grid over the ranks first_rank .. first_rank + world - 1; what they leave is data parallel.

    An engine's grid has `tensor` only: its data parallel ranks are the replicas. `virtual` is the number of model
    chunks that a stage holds. Experts are split over `expert` * `expert_tensor` ranks of a stage.
    """

    world: int
    first_rank: int = 0
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual: int = 1

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def optimizer_shards(self) -> int:
        """Ranks over which the distributed optimizer spreads its state."""
        return self.data * self.context

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.world)

    def coord(self, rank: int) -> GridCoord:
        rest, tp = divmod(self._place(rank), self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        return GridCoord(tp=tp, pp=pp, dp=dp, cp=cp)

    def num_slots(self, is_expert: bool) -> int:
        """Into how many shards a parameter of one stage is split."""
        return self.expert * self.expert_tensor if is_expert else self.tensor

    def slot(self, rank: int, is_expert: bool) -> tuple[int, int]:
        """(which, of how many) shards of the parameters of its stage `rank` holds."""
        num_slots = self.num_slots(is_expert)
        return self._place(rank) % self._ranks_per_stage % num_slots, num_slots

    def expert_rank(self, rank: int) -> int:
        """Which of the `expert` parts of a stage's experts `rank` holds."""
        return self.slot(rank, is_expert=True)[0] // self.expert_tensor

    def ranks_of_slot(self, stage: int, slot: int, is_expert: bool) -> range:
        """Ranks that hold shard `slot` of a parameter of `stage`: the replicas over data (and context) parallel."""
        first = self.first_rank + stage * self._ranks_per_stage
        return range(first + slot, first + self._ranks_per_stage, self.num_slots(is_expert))

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Chunks of layers go round the stages `virtual` times."""
        per_chunk = num_layers // (self.pipeline * self.virtual)
        return layer // per_chunk % self.pipeline

    @property
    def _ranks_per_stage(self) -> int:
        return self.world // self.pipeline

    def _place(self, rank: int) -> int:
        assert rank in self.ranks, f"rank {rank} is not one of {self.ranks}"
        return rank - self.first_rank

    # --------------------------------------------------------------------------------------------------------- problems

    def problems(self, shape: TransformerShape) -> list[GridProblem]:
        """Why a trainer of this model cannot have these sizes on these ranks; empty when it can."""
        return [*self.rank_problems(), *self.shape_problems(shape)]

    def too_small(self) -> list[GridProblem]:
        sizes = {name: getattr(self, name) for name in SIZES}
        return [GridProblem((name,), size, "must be at least 1") for name, size in sizes.items() if size < 1]

    def rank_problems(self) -> list[GridProblem]:
        """Sizes against the number of ranks."""
        if problems := self.too_small() or list(self._divides(("tensor", "pipeline", "context"), self.world, "ranks")):
            return problems
        return list(self._divides(("expert", "expert_tensor"), self._ranks_per_stage, "ranks of a stage"))

    def shape_problems(self, shape: TransformerShape) -> list[GridProblem]:
        """Sizes of a trainer's grid against those of the model; sizes below 1 are `rank_problems`."""
        if self.too_small():
            return []
        ffn_split = "expert_tensor" if shape.num_experts else "tensor"
        return [
            *self._layers(shape.num_layers),
            *self.deepstack_problems(shape),
            *self._heads(shape),
            *self._divides(("tensor",), shape.hidden_size, "hidden units"),
            *self._divides((ffn_split,), shape.ffn_hidden_size, "feed-forward columns"),
            *self._experts(shape.num_experts),
        ]

    def run_problems(self, shape: TransformerShape, context_comm: str) -> list[GridProblem]:
        """What the schedules and the attention of a training run ask for in addition."""
        if self.too_small():
            return []
        problems = []
        if self.virtual > 1 and self.pipeline == 2:  # Megatron-core's two directions of messages get mixed up
            why = "needs a pipeline of more than 2 stages; use 1"
            problems.append(GridProblem(("virtual",), self.virtual, why))
        if context_comm == "a2a" and self.context > 1 and shape.num_heads % (self.tensor * self.context):
            why = f"{shape.num_heads} heads / tensor={self.tensor} do not divide over context={self.context} ranks"
            problems.append(GridProblem(("context_comm",), context_comm, f"{why}; use all_gather or p2p"))
        return problems

    def engine_problems(self, shape: TransformerShape) -> list[GridProblem]:
        """Sizes of an engine's grid against those of the model; sizes below 1 are `rank_problems`."""
        if self.too_small():
            return []
        return [
            *self._heads(shape),
            *self._divides(("tensor",), shape.ffn_hidden_size, "feed-forward columns"),
        ]

    def deepstack_problems(self, shape: TransformerShape) -> list[GridProblem]:
        """Layers that take media features must be in the first part of the pipeline: the only one that is given any."""
        num_first = shape.num_layers // (self.pipeline * self.virtual)
        if num_first >= shape.deepstack_levels:
            return []
        why = f"the first stage holds {num_first} of the {shape.deepstack_levels} layers that take media features"
        return [GridProblem(("pipeline",), self.pipeline, f"{why}; use fewer stages or virtual chunks")]

    def _divides(self, names: tuple[str, ...], total: int, what: str) -> Iterator[GridProblem]:
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) > 1}
        product = math.prod(sizes.values())
        if total % product:
            yield GridProblem(tuple(sizes), product, f"does not divide {total} {what}; use a divisor")

    def _layers(self, num_layers: int) -> Iterator[GridProblem]:
        if self.virtual > 1 and self.pipeline == 1:
            why = "one pipeline stage has no virtual ones; use several stages, or 1"
            yield GridProblem(("virtual",), self.virtual, why)
        yield from self._divides(("pipeline", "virtual"), num_layers, "layers")

    def _heads(self, shape: TransformerShape) -> Iterator[GridProblem]:
        yield from self._divides(("tensor",), shape.num_heads, "attention heads")
        if shape.num_groups % self.tensor and self.tensor % shape.num_groups:
            why = f"neither divides nor is a multiple of {shape.num_groups} KV heads; change it"
            yield GridProblem(("tensor",), self.tensor, why)

    def _experts(self, num_experts: int) -> Iterator[GridProblem]:
        if num_experts:
            yield from self._divides(("expert",), num_experts, "experts")
            return
        for name, size in (("expert", self.expert), ("expert_tensor", self.expert_tensor)):
            if size > 1:
                yield GridProblem((name,), size, "the model has no experts; use 1")


SIZES = ("world", "tensor", "pipeline", "context", "expert", "expert_tensor", "virtual")
