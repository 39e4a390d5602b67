# SPDX-License-Identifier: Apache-2.0
"""Every recipe in the tree loads, and its numbers fit together on the smallest number of ranks it can use."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_rl.config.checks import check
from megatron_rl.config.command_line import JOBS
from megatron_rl.config.io import load_config
from megatron_rl.config.schema import RlConfig, SftConfig

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "scripts/recipes").rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    cfg = load_config(str(recipe), SftConfig if "sft" in recipe.stem else RlConfig)
    parallel = cfg.parallel
    num_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if isinstance(cfg, RlConfig):
        num_ranks = math.lcm(num_ranks, cfg.rollout.tensor)
    check(cfg, num_ranks, JOBS[type(cfg)], require_files=False)
