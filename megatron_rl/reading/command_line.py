# SPDX-License-Identifier: Apache-2.0
"""`python -m megatron_rl.inspect_data RECIPE`, and what `--check` of every job reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.console import say, write_json
from megatron_rl.config.checks import check_inputs
from megatron_rl.config.command_line import EXIT_USAGE
from megatron_rl.config.io import load_config
from megatron_rl.config.schema import CacheConfig, JobConfig, RlConfig
from megatron_rl.errors import raise_all
from megatron_rl.rewards.registry import load_reward
from megatron_rl.runtime.quiet import quiet_libraries
from megatron_rl.types import Completion, Prompt

EXIT_WOULD_STOP = 1
NUM_OPENED = 32
"""Rows of each data set whose media `--check` opens if not told otherwise."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where the job would stop, 2 for a recipe that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.inspect_data",
        description="Read the data of a recipe as its job would, without weights and engine: what is usable, what is "
        "set aside and why, what a prompt looks like. Exit status 1 where the job would stop.",
    )
    parser.add_argument("recipe", help="YAML file of an RL or SFT run, for example one of scripts/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show the first N prompts (default 3)")
    parser.add_argument(
        "--check-rows", type=int, default=0, metavar="N", help="read N records of each data set; 0 = all"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = load_config(args.recipe, CacheConfig, args.overrides)
        assert isinstance(cfg, JobConfig)
        check_inputs(cfg)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USAGE
    quiet_libraries()
    return _inspect(cfg, args.rows, args.check_rows, args.json)


def _inspect(cfg: JobConfig, num_shown: int, num_records: int, json_path: Path | None) -> int:
    from megatron_rl.reading.inspection import ReadLimits, inspect_inputs
    from megatron_rl.reading.report import as_json, as_text

    try:
        inspection = inspect_inputs(cfg, ReadLimits(records=num_records), num_shown)
    except ValueError as error:
        sys.stderr.write(f"{error}\nthe job would stop\n")
        return EXIT_WOULD_STOP
    if json_path is not None:
        write_json(json_path, as_json(inspection))
    say(as_text(inspection))
    for problem in inspection.problems:
        say(f"problem: {problem}")
    say("the job would stop" if inspection.problems else "nothing in the data stands in the way of the job")
    return EXIT_WOULD_STOP if inspection.problems else 0


def check_data(cfg: JobConfig, num_records: int | None) -> None:
    """What `--check` does with the data of a job: every record read, the media of the first NUM_OPENED rows of each
    data set opened; `num_records` reads so many of each, and opens all of those (0 = all there are). The reward is
    called once, on a made-up answer. Raises ValueError with every problem."""
    from megatron_rl.reading.inspection import ReadLimits, inspect_inputs

    quiet_libraries()
    limits = ReadLimits(prompts=NUM_OPENED) if num_records is None else ReadLimits(records=num_records)
    inspection = inspect_inputs(cfg, limits)
    for text in inspection.notes:
        say(f"note: {text}")  # on stdout, which launch.sh hides: the job says it again
    raise_all(inspection.problems, "data")
    if isinstance(cfg, RlConfig) and inspection.first:
        try_reward(cfg, inspection.first)


def try_reward(cfg: RlConfig, prompt: Prompt) -> None:
    """Call the reward on a made-up answer to `prompt`. Raises ValueError for a result that is none."""
    reward = load_reward(cfg.reward.name, cfg.reward.terms)
    reward([prompt], [Completion(prompt.prompt_id, 0, (0,), (0.0,), "<think>made up</think><answer>A</answer>", False)])
