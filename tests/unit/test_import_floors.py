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

FLOORS: dict[str, tuple[int, str]] = {  # floor and purpose; the longest prefix wins; equal floors do not see each other
    "megatron_rl.runtime.compress": (0, "rows of integers and of times as few bytes"),
    "megatron_rl.errors": (0, "what can go wrong, and how it is told"),
    "megatron_rl.types": (1, "the arrows of the data flow"),
    "megatron_rl.protocols": (2, "every seam on one page"),
    "megatron_rl.runtime": (3, "devices, ranks, files, processes: the only modules that know CPU from GPU"),
    "megatron_rl.algorithms": (4, "advantages, losses, KL: pure functions"),
    "megatron_rl.rewards": (4, "rewards and grading"),
    "megatron_rl.observe": (4, "metrics, progress, reports, rows that were set aside"),
    "data": (5, "rows, frames, sound"),
    "model_providers": (5, "Megatron modules, weight tables and encoders of the model families"),
    "megatron_rl.config": (6, "the recipe: schema, reading, checks, command line"),
    "checkpoint_tools": (6, "Hugging Face <-> Megatron, verified"),
    "megatron_rl.media": (7, "media encoded once a step by all ranks, embeddings to who needs them"),
    "megatron_rl.weight_sync": (7, "Megatron's shards into vLLM's parameters"),
    "megatron_rl.rollout": (8, "the engine, requests, sampled groups"),
    "megatron_rl.training": (8, "packing, scoring, updates, checkpoints"),
    "megatron_rl.reading": (9, "what a job reads, from its recipe, and what would come of it"),
    "megatron_rl.planner": (9, "memory and time of a recipe, without a GPU"),
    "megatron_rl": (10, "the jobs: they compose the phases"),
}

ONLY_IN = {
    "vllm": (
        "megatron_rl/rollout/vllm_engine.py",
        "megatron_rl/rollout/vllm_adaptations.py",
        "megatron_rl/rollout/requests.py",
        "checkpoint_tools/vllm_check.py",
    ),
    "nvidia.dali": ("data/video/dali.py",),
    "wandb": ("megatron_rl/observe/metric_log.py",),
    "matplotlib": ("megatron_rl/observe/report.py",),
    "math_verify": ("megatron_rl/rewards/value_worker.py",),
    "megatron.core.parallel_state": ("megatron_rl/runtime/parallel.py", "model_providers/"),
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


def floor_of(name: str) -> str | None:
    """The entry of FLOORS that a module belongs to; a folder of megatron_rl needs one of its own."""
    entry = under(name, FLOORS)
    is_new_folder = entry == "megatron_rl" and name.count(".") > 1
    return None if is_new_folder else entry


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        imports = list(runtime_imports(ast.parse(path.read_text(encoding="utf-8"))))
        here = floor_of(name)
        if here is None and imports:
            found.append(f"{name}: stands on no floor; add its folder to FLOORS")
        for line, imported in imports:
            there = under(imported, FLOORS)
            if imported.startswith("."):
                found.append(f"{name}:{line}: relative import; write the full name")
            elif here and there and here != there and FLOORS[there][0] >= FLOORS[here][0]:
                found.append(f"{name}:{line}: {here} (floor {FLOORS[here][0]}) imports {imported} of {there}")
            library = under(imported, ONLY_IN)
            if library and not path.relative_to(root).as_posix().startswith(ONLY_IN[library] or ("-",)):
                found.append(f"{name}:{line}: imports {imported}; only {', '.join(ONLY_IN[library]) or 'nobody'} may")
    return found


def floor_table() -> str:
    """The table of CONTRIBUTING.md."""
    lines = ["| floor | folder or file | purpose |", "|---|---|---|"]
    for name, (floor, purpose) in FLOORS.items():
        path = name.replace(".", "/")
        lines.append(f"| {floor} | `{path}{'.py' if (REPO / f'{path}.py').exists() else '/'}` | {purpose} |")
    return "\n".join(lines)


def test_the_tree_keeps_its_floors():
    assert violations(REPO) == []


def test_the_table_of_floors_is_in_contributing():
    assert floor_table() in (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), (
        f"write this there:\n{floor_table()}"
    )


def test_the_root_of_megatron_rl_can_be_taken_in_at_a_glance():
    assert len(list((REPO / "megatron_rl").glob("*.py"))) <= 15


def test_the_check_sees_what_it_should(tmp_path):
    files = {
        "megatron_rl/protocols.py": "from typing import TYPE_CHECKING\nfrom megatron_rl.types import P\n"
        "if TYPE_CHECKING:\n    from model_providers.weight_map import W\nelse:\n    import data.audio\n",
        "data/video/dali.py": "from nvidia.dali import fn\nfrom data.rows import a\nfrom megatron_rl.types import V\n",
        "data/audio.py": "def f():\n    from model_providers.provider import get\n    import vllm\n",
        "megatron_rl/rollout/a.py": "from megatron_rl import training\nfrom . import b\nimport megatron_rl.rollout.b\n",
        "megatron_rl/new/file.py": "import json\n",
        "megatron_rl/training/c.py": "import megatron.training\nfrom megatron.core import parallel_state\n",
        "megatron_rl/loop.py": "from megatron_rl.rollout.a import A\nfrom megatron_rl.training.c import C\n",
        "model_providers/m.py": "from megatron.core import parallel_state\nimport vllm_something\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    owners = ONLY_IN["megatron.core.parallel_state"]
    assert violations(tmp_path) == [
        "data.audio:2: data (floor 5) imports model_providers.provider.get of model_providers",
        f"data.audio:3: imports vllm; only {', '.join(ONLY_IN['vllm'])} may",
        "megatron_rl.new.file: stands on no floor; add its folder to FLOORS",
        "megatron_rl.protocols:6: megatron_rl.protocols (floor 2) imports data.audio of data",
        "megatron_rl.rollout.a:1: megatron_rl.rollout (floor 8) imports megatron_rl.training of megatron_rl.training",
        "megatron_rl.rollout.a:2: relative import; write the full name",
        "megatron_rl.training.c:1: imports megatron.training; only nobody may",
        f"megatron_rl.training.c:2: imports megatron.core.parallel_state; only {', '.join(owners)} may",
    ]


def test_a_mistake_in_a_recipe_costs_no_heavy_import():
    code = (
        "import sys, megatron_rl.config.command_line, megatron_rl.config.checks;"
        "heavy = {'torch', 'transformers', 'vllm', 'megatron.core', 'math_verify'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
