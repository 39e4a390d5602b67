# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe fits on given GPUs, what it needs there and how long a step may take, before anyone rents them.

    python -m megatron_rl.plan scripts/recipes/qwen2_5_vl_7b_longvideo.yaml --gpus 8 --gpu a100-80g

Needs the recipe and the model's config.json (or a folder named after a published model); no weights, data, GPU, torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rl.config.checks import range_problems
from megatron_rl.config.io import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import raise_all
from megatron_rl.planner import view
from megatron_rl.planner.gpus import GIB, GPUS, gpu_of
from megatron_rl.planner.long_rl import claims
from megatron_rl.planner.model import load_planned_model
from megatron_rl.planner.report import claims_json, plan_json
from megatron_rl.planner.search import (
    Machine,
    evaluate,
    helpful_knobs,
    larger_budget,
    largest_frames,
    parallel_problems,
    search,
)
from megatron_rl.planner.workload import Assumptions, workload_of, workload_problems
from megatron_rl.runtime.files import write_atomically

EXIT_DOES_NOT_FIT, EXIT_USAGE = 1, 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    usual = Assumptions()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.plan",
        description="Plan a recipe for megatron_rl.train: memory of every phase, predicted times, what does not fit, "
        "what would help.",
        epilog="exit status: 0 it fits, 1 it does not, 2 the recipe or the command line is wrong",
    )
    default, size = "(default: %(default)s)", f"{usual.width}x{usual.height}"
    parser.add_argument("recipe", help="YAML file, for example one of scripts/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument("--gpus", type=int, default=8, help=f"number of GPUs {default}")
    parser.add_argument("--gpu", default="a100-80g", help=f"one of {', '.join(GPUS)} {default}")
    parser.add_argument("--video", metavar="WxH", default=size, help=f"size of the files' pictures {default}")
    parser.add_argument(
        "--seconds", type=float, default=usual.seconds, help=f"length of a video, for data.fps {default}"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=usual.text_tokens, help=f"of a prompt, beside the video's {default}"
    )
    parser.add_argument(
        "--response-tokens", type=int, default=0, help="of a response (default: rollout.max_response_tokens)"
    )
    reserve = f"GiB for CUDA, NCCL and gaps {default}"
    parser.add_argument("--reserve", type=float, default=usual.reserve / GIB, help=reserve)
    parser.add_argument("--long-rl", action="store_true", help="plan Long-RL's claim on 8 and 64 of these GPUs as well")
    parser.add_argument("--json", metavar="PATH", help="write all numbers: bytes, FLOPs, seconds")
    return parser.parse_intermixed_args(argv)


def _machine(args: argparse.Namespace) -> Machine:
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.video)
    problems = [] if size else [f"--video={args.video}: not a size; write e.g. 1280x720"]
    above_zero = {"--gpus": args.gpus, "--seconds": args.seconds}
    problems += [f"{name}={value}: must be above 0" for name, value in above_zero.items() if not value > 0]
    at_least_zero = {
        "--text-tokens": args.text_tokens,
        "--response-tokens": args.response_tokens,
        "--reserve": args.reserve,
    }
    problems += [f"{name}={value}: must not be below 0" for name, value in at_least_zero.items() if not value >= 0]
    if args.gpu not in GPUS:
        problems.append(f"--gpu={args.gpu}: not in the table; one of {', '.join(GPUS)}")
    raise_all(problems, "command line")
    assert size is not None
    width, height = map(int, size.groups())
    assumed = Assumptions(width, height, args.seconds, args.text_tokens, args.response_tokens, int(args.reserve * GIB))
    return Machine(gpu_of(args.gpu), args.gpus, assumed)


def _plan(args: argparse.Namespace, console: Console) -> tuple[bool, dict[str, Any]]:
    """Print the plan; (whether the recipe fits, the numbers)."""
    machine = _machine(args)
    cfg = load_config(args.recipe, RlConfig, args.overrides)
    raise_all(range_problems(cfg), f"recipe {args.recipe}")
    model = load_planned_model(cfg.model.hf)
    raise_all(parallel_problems(cfg, model, machine.world), f"recipe {args.recipe} on {machine.world} GPUs")
    option = evaluate(cfg, model, machine)
    problems = workload_problems(cfg, model, workload_of(cfg, model, machine.assumed))
    knobs = [] if option.memory.fits else helpful_knobs(option, machine)
    options = search(cfg, model, machine)
    limit = largest_frames(cfg, model, machine) if model.tower is not None else None
    where = f"{machine.world} x {machine.gpu.name}"
    console.print(f"{args.recipe}: {model.name} ({model.source}) on {where}", highlight=False, soft_wrap=True)
    parts = [*view.work_lines(option), view.memory_table(option), *view.verdict(option, problems, knobs)]
    parts.append(view.times_table(option))
    if (knob := larger_budget(option, machine)) is not None:
        parts.append(view.faster(knob, option))
    parts += view.layouts_tables(options)
    if limit is not None:
        parts.append(view.limit_text(limit, machine.world))
    for part in parts:
        console.print(part)
    numbers = plan_json(option, problems, knobs, options, limit)
    if args.long_rl:
        found = list(claims(machine.gpu, machine.assumed))
        console.print(view.claims_table(found, machine.gpu.name))
        numbers["long_rl"] = claims_json(found)
    return option.memory.fits and not problems, numbers


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    console = Console()
    try:
        fits, numbers = _plan(args, console)
    except ValueError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_USAGE
    if args.json:
        write_atomically(Path(args.json), (json.dumps(numbers) + "\n").encode())
    return 0 if fits else EXIT_DOES_NOT_FIT
