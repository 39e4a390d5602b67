# SPDX-License-Identifier: Apache-2.0
"""Every recipe in the tree loads, and its numbers fit together on the smallest number of ranks it can use."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_rl.config.checks import check
from megatron_rl.config.io import load_config

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "scripts/recipes").rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    cfg = load_config(str(recipe))
    parallel = cfg.parallel
    num_ranks = math.lcm(parallel.tensor * parallel.pipeline * parallel.context, cfg.rollout.tensor)
    check(cfg, num_ranks, "sft" if "sft" in recipe.stem else "rl", require_files=False)
