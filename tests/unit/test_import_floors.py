# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: lower floors or the own package; a heavy library in one place; configuration without torch.

The tests read the source with `ast`. An import under `if TYPE_CHECKING:` never runs and does not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
PACKAGES = ("megatron_rl", "model_providers", "data", "checkpoint_tools")

FLOORS = {  # the longest prefix wins; a package stands on one floor, and phases do not see each other
    "megatron_rl.types": 0,
    "megatron_rl.config": 0,
    "megatron_rl.errors": 0,
    "megatron_rl.quiet": 0,
    "megatron_rl.protocols": 1,
    "megatron_rl.config_io": 1,
    "megatron_rl.mcore_on_cpu": 1,
    "megatron_rl.device": 2,
    "megatron_rl.algorithms": 2,
    "megatron_rl.rewards": 2,
    "megatron_rl.metrics": 2,
    "megatron_rl.watchdog": 2,
    "megatron_rl.parallel": 3,
    "megatron_rl.config_checks": 5,
    "megatron_rl.report": 3,
    "megatron_rl.signals": 4,
    "data": 4,
    "model_providers": 4,
    "checkpoint_tools": 5,
    "megatron_rl.rollout": 6,
    "megatron_rl.training": 6,
    "megatron_rl.quarantine": 2,
    "megatron_rl.launch": 6,
    "megatron_rl.planner": 7,
    "megatron_rl.plan": 8,
    "megatron_rl.plan_sync": 8,
    "megatron_rl.plan_sync_view": 7,
    "megatron_rl.step_metrics": 7,
    "megatron_rl.session": 7,
    "megatron_rl.job": 8,
    "megatron_rl.loop": 8,
    "megatron_rl.evaluate": 9,
    "megatron_rl.sft": 9,
    "megatron_rl.cache_videos": 9,
    "megatron_rl.train": 10,
}

ONLY_IN = {
    "vllm": ("megatron_rl/rollout/vllm_engine.py", "checkpoint_tools/vllm_check.py"),
    "nvidia.dali": ("data/dali.py",),
    "wandb": ("megatron_rl/metrics.py",),
    "matplotlib": ("megatron_rl/report.py",),
    "math_verify": ("megatron_rl/rewards/grading.py",),
    "megatron.core.parallel_state": ("megatron_rl/parallel.py", "model_providers/"),
    "megatron.training": (),
}


def runtime_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import that runs; `from a import b` counts as a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from runtime_imports(ast.Module([branch], []))
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        yield from runtime_imports(node)


def under(name: str, prefixes) -> str | None:
    """The longest of the dotted prefixes that `name` lies under."""
    return max((prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")), key=len, default=None)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        imports = list(runtime_imports(ast.parse(path.read_text(encoding="utf-8"))))
        here = under(name, FLOORS)
        if here is None and imports:
            found.append(f"{name}: stands on no floor; add it to FLOORS")
        for line, imported in imports:
            there = under(imported, FLOORS)
            if imported.startswith("."):
                found.append(f"{name}:{line}: relative import; write the full name")
            elif here and there and here != there and FLOORS[there] >= FLOORS[here]:
                found.append(f"{name}:{line}: floor {FLOORS[here]} imports {imported} of floor {FLOORS[there]}")
            library = under(imported, ONLY_IN)
            if library and not path.relative_to(root).as_posix().startswith(ONLY_IN[library] or ("-",)):
                found.append(f"{name}:{line}: imports {imported}; only {', '.join(ONLY_IN[library]) or 'nobody'} may")
    return found


def test_the_tree_keeps_its_floors():
    assert violations(REPO) == []


def test_the_check_sees_what_it_should(tmp_path):
    files = {
        "megatron_rl/protocols.py": "from typing import TYPE_CHECKING\nfrom megatron_rl.types import P\n"
        "if TYPE_CHECKING:\n    from model_providers.weight_map import W\nelse:\n    import data.dali\n",
        "data/dali.py": "from nvidia.dali import fn\nfrom data.frames import pick\nfrom megatron_rl.types import V\n",
        "data/video.py": "def f():\n    from model_providers.registry import get\n    import vllm\n",
        "megatron_rl/rollout/a.py": "from megatron_rl import training\nfrom . import b\nimport megatron_rl.rollout.b\n",
        "megatron_rl/new.py": "import json\n",
        "megatron_rl/training/c.py": "import megatron.training\nfrom megatron.core import parallel_state\n",
        "megatron_rl/loop.py": "from megatron_rl.rollout.a import A\nfrom megatron_rl.training.c import C\n",
        "model_providers/m.py": "from megatron.core import parallel_state\nimport vllm_something\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    owners = ONLY_IN["megatron.core.parallel_state"]
    assert violations(tmp_path) == [
        "data.video:2: floor 4 imports model_providers.registry.get of floor 4",
        f"data.video:3: imports vllm; only {', '.join(ONLY_IN['vllm'])} may",
        "megatron_rl.new: stands on no floor; add it to FLOORS",
        "megatron_rl.protocols:6: floor 1 imports data.dali of floor 4",
        "megatron_rl.rollout.a:1: floor 6 imports megatron_rl.training of floor 6",
        "megatron_rl.rollout.a:2: relative import; write the full name",
        "megatron_rl.training.c:1: imports megatron.training; only nobody may",
        f"megatron_rl.training.c:2: imports megatron.core.parallel_state; only {', '.join(owners)} may",
    ]


def test_a_mistake_in_a_recipe_costs_no_heavy_import():
    code = (
        "import sys, megatron_rl.config, megatron_rl.config_io, megatron_rl.config_checks;"
        "heavy = {'torch', 'transformers', 'vllm', 'megatron.core', 'math_verify'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
