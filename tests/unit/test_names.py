# SPDX-License-Identifier: Apache-2.0
"""One class name, one meaning: a reader who has met a name once knows it everywhere."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).parents[2]
FOLDERS = ("megatron_rl", "model_providers", "data", "checkpoint_tools", "scripts")


def test_no_public_class_name_is_used_twice():
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(REPO).as_posix())
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert not twice
