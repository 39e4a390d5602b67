# SPDX-License-Identifier: Apache-2.0
"""One class name, one meaning, and one legend of shapes: a reader who has met a name once knows it everywhere."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import megatron_rl.types

REPO = Path(__file__).parents[2]
FOLDERS = ("megatron_rl", "model_providers", "data", "checkpoint_tools", "scripts")
PIXELS = {"H", "W"}  # of a picture, where they stand behind each other: not the hidden size


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")):
        yield path.relative_to(REPO).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def public_types(module: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, definition) of the classes and type aliases at the top of a module."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, "a class"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
                yield name, ast.unparse(node.value)


def shapes(module: ast.Module) -> Iterator[str]:
    """What stands in square brackets in the docstrings of a module, as far as it reads like a shape."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            found = re.findall(r"\[([^\[\]]+)\]", ast.get_docstring(node) or "")
            yield from (text for text in found if not re.search(r"[.=:\"`]|--", text))


def test_no_public_name_of_a_type_has_two_meanings():
    homes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, module in modules():
        for name, definition in public_types(module):
            homes[name].append((definition, path))
    twice = {
        name: found
        for name, found in homes.items()
        if len({meaning for meaning, _ in found}) > 1 or [meaning for meaning, _ in found].count("a class") > 1
    }
    assert not twice


def test_shapes_are_written_in_the_letters_of_the_legend():
    legend = set(re.findall(r"(?:^ {4}|; )([A-Za-z])\b", megatron_rl.types.__doc__ or "", re.MULTILINE))
    assert {"T", "R", "H", "n"} < legend
    unknown = [
        f"{path}: [{shape}]"
        for path, module in modules()
        for shape in shapes(module)
        if set(re.findall(r"\b[A-Z]\b", shape)) - legend - (PIXELS if "H, W" in shape else set())
    ]
    assert not unknown
