# SPDX-License-Identifier: Apache-2.0
"""What a weight sync will move, before anyone rents a GPU: bytes per rank, a better placement, who sends what to whom.

    python -m megatron_rl.plan_sync --train tp=4,pp=2 --rollout tp=2 --model Qwen2.5-7B

Needs a model's config.json (or a known name), no weights, no GPU and no torch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rl.errors import raise_all
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.cost import Links, SyncCost, cost_of, full_gather_elements
from megatron_rl.weight_sync.grid_checks import ROLLOUT_SIZES, TRAIN_SIZES, grid_problems
from megatron_rl.weight_sync.placement import best_placement, overlap, ranks_in_order
from megatron_rl.weight_sync.plan import ReshardPlan, build_plan
from megatron_rl.weight_sync.view import explanation, report
from model_providers.family import Config, read_config, shape_and_weights
from model_providers.known import KNOWN_CONFIGS
from model_providers.shape import TransformerShape
from model_providers.weight_map import WeightMap

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GB = 1e9


@dataclass(frozen=True, slots=True)
class Model:
    """A model as far as planning needs it."""

    name: str
    shape: TransformerShape
    weights: WeightMap


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """A sync in both placements, ranks as they are and ranks as advised, with their costs in bytes."""

    model: Model
    usual: ReshardPlan
    advised: ReshardPlan
    usual_cost: SyncCost
    advised_cost: SyncCost
    full_gather: float
    """Bytes a rank receives on average when every rank builds the whole model."""

    @property
    def minimum(self) -> float:
        """Bytes per rank, on average, that are needed and not already there; no sync can move less."""
        return float((self.usual_cost.need - self.usual_cost.local).mean())


def plan_sync(model: Model, trainer: Grid, engine: Grid, bytes_per_element: int, links: Links) -> SyncPlan:
    """Plan a sync with the ranks in their usual order and in the order that keeps most bytes local."""
    raise_all(grid_problems(model.shape, model.weights, trainer, engine), "layouts")
    num_layers = model.shape.num_layers
    usual = build_plan(model.weights, num_layers, trainer, engine)
    position = best_placement(overlap(model.weights, num_layers, trainer, engine), links.ranks_per_node)
    is_usual = position == tuple(range(engine.world))
    advised = (
        replace(usual, engine_position=position)
        if is_usual
        else build_plan(model.weights, num_layers, trainer, engine, position)
    )
    usual_cost = cost_of(usual, bytes_per_element, links)
    return SyncPlan(
        model=model,
        usual=usual,
        advised=advised,
        usual_cost=usual_cost,
        advised_cost=usual_cost if is_usual else cost_of(advised, bytes_per_element, links),
        full_gather=full_gather_elements(model.weights, num_layers, trainer) * bytes_per_element,
    )


def load_model(name: str) -> Model:
    """A known name, a config.json, or a folder that holds one."""
    if name in KNOWN_CONFIGS:
        config: Config = KNOWN_CONFIGS[name]
    else:
        if not Path(name).exists():
            raise ValueError(f"--model={name}: no such file; give a config.json or one of {', '.join(KNOWN_CONFIGS)}")
        config = read_config(name, "--model")
    return Model(name, *shape_and_weights(config, name, "--model"))


def parse_sizes(option: str, text: str, names: Mapping[str, str]) -> dict[str, int]:
    """`tp=4,pp=2` as fields of Grid; every mistake in one message."""
    sizes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in names:
            problems.append(f"{option} {part}: unknown size; write e.g. {','.join(f'{n}=2' for n in names)}")
        elif not value.isdecimal():
            problems.append(f"{option} {part}: not a number; write e.g. {key}=2")
        elif names[key] in sizes:
            problems.append(f"{option} {part}: {key} is given twice; give it once")
        else:
            sizes[names[key]] = int(value)
    raise_all(problems, "layouts")
    return sizes


def smallest_world(train: Mapping[str, int], rollout: Mapping[str, int]) -> int:
    """The fewest GPUs, a usual node of 8 or more, that both grids divide."""
    of = {name: max(1, train.get(name, 1)) for name in TRAIN_SIZES.values()}
    dense = of["tensor"] * of["pipeline"] * of["context"]
    experts = of["expert"] * of["expert_tensor"] * of["pipeline"]
    base = math.lcm(dense, experts, max(1, rollout.get("tensor", 1)))
    return base * -(-8 // base)


def as_json(plan: SyncPlan, train: str, rollout: str) -> dict[str, Any]:
    """Bytes; `full_gather_received` and `minimum` are averages per rank."""
    return {
        "model": plan.model.name,
        "train": train,
        "rollout": rollout,
        "gpus": plan.usual.world,
        "ranks": _ranks(plan.usual_cost),
        "full_gather_received": plan.full_gather,
        "minimum": plan.minimum,
        "rank_permutation": list(ranks_in_order(plan.advised.engine_position)),
        "permuted": _ranks(plan.advised_cost),
        "predicted_seconds": {"usual": plan.usual_cost.seconds, "permuted": plan.advised_cost.seconds},
    }


def _ranks(cost: SyncCost) -> list[dict[str, int]]:
    columns = (cost.need.tolist(), cost.local.tolist(), cost.received.tolist(), cost.sent.tolist())
    keys = ("rank", "need", "local", "received", "sent")
    return [dict(zip(keys, (rank, *row), strict=True)) for rank, row in enumerate(zip(*columns, strict=True))]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.plan_sync", description="Plan a weight sync from a trainer's layout to an engine's."
    )
    parser.add_argument("--train", required=True, metavar="tp=4,pp=2", help="sizes: " + ", ".join(TRAIN_SIZES))
    parser.add_argument("--rollout", required=True, metavar="tp=2", help="sizes of a vLLM engine: tp")
    parser.add_argument("--model", required=True, help=f"config.json, its folder, or {', '.join(KNOWN_CONFIGS)}")
    parser.add_argument("--gpus", type=int, help="default: the smallest world from 8 on that both layouts divide")
    parser.add_argument("--dtype", choices=BYTES, default="bfloat16", help="of the engine (default: bfloat16)")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s per GPU and direction in a node (default: 450)")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU and direction across (default: 50)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument("--explain", metavar="PARAM", help="who sends what of a parameter (HF, Megatron or vLLM name)")
    parser.add_argument("--json", metavar="PATH", help="write the numbers in bytes")
    return parser.parse_args(argv)


def _links(args: argparse.Namespace) -> Links:
    values = {"--nvlink": args.nvlink, "--network": args.network, "--gpus-per-node": args.gpus_per_node}
    raise_all((f"{name}={value}: must be above 0" for name, value in values.items() if not value > 0), "links")
    return Links(args.nvlink * GB, args.network * GB, args.gpus_per_node)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        train = parse_sizes("--train", args.train, TRAIN_SIZES)
        rollout = parse_sizes("--rollout", args.rollout, ROLLOUT_SIZES)
        world = smallest_world(train, rollout) if args.gpus is None else args.gpus
        model = load_model(args.model)
        plan = plan_sync(model, Grid(world, **train), Grid(world, **rollout), BYTES[args.dtype], _links(args))
        explained = explanation(plan.usual, model.weights, args.explain) if args.explain else ()
    except ValueError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console = Console()
    title = f"{model.name} in {args.dtype}: train {args.train} -> rollout {args.rollout} on {world} GPUs"
    console.print(title, highlight=False, soft_wrap=True)
    shown = report(plan.usual_cost, plan.advised_cost, plan.advised, plan.full_gather)
    for part in (*shown, *explained):
        console.print(part)
    if args.json:
        write_atomically(Path(args.json), (json.dumps(as_json(plan, args.train, args.rollout)) + "\n").encode())
    return 0
