# SPDX-License-Identifier: Apache-2.0
"""Recipes on disk <-> RunConfig: strict keys and types, `key.path=value` overrides, and the `--help` text.

Every problem of a recipe is reported in one message. YAML is read by its 1.2 rules, so that `off` is a word and
`1e-6` a number; what `dump_config` writes loads back to an equal object.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import math
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from megatron_rl.config import schema
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import raise_all

# ---------------------------------------------------------------------------------------------------------------- YAML

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2; a key written twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly the words that _Loader would not read as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if not path.is_file():
        hint = "the first argument is the recipe, overrides come after it" if "=" in recipe else "check the path"
        raise ValueError(f"recipe={recipe}: no such file; {hint}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe={recipe}: not readable as YAML ({_one_line(error)}); fix the file") from error
    if not isinstance(tree, dict):
        raise ValueError(f"recipe={recipe}: holds {_kind_of(tree)}, not `key: value` lines; start from scripts/recipes")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> Iterator[str]:
    """Set one `key.path=value` in the tree; yields a problem when that cannot be done."""
    path, equals, raw = text.partition("=")
    if not equals or not path:
        yield f"{text}: not an override; write key.path=value"
        return
    try:
        value = yaml.load(raw, Loader=_Loader) if raw else ""
    except yaml.YAMLError as error:
        yield f"{text}: the value is not readable as YAML ({_one_line(error)}); quote it"
        return
    *sections, key = path.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            yield f"{text}: '{section}' is a value, not a section; see --help for the keys"
            return
    if isinstance(value, dict):
        yield f"{text}: an override sets one value; write {path}.<key>=value"
        return
    tree[key] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------- tree -> dataclasses


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply the overrides in order, and check every key and type (not yet the values: config_checks)."""
    tree = _read_recipe(recipe)
    problems = [problem for text in overrides for problem in _apply_override(tree, text)]
    config = _build(RunConfig, tree, "", problems)
    raise_all(problems, f"recipe {recipe}")
    assert isinstance(config, RunConfig)
    return config


def _build(section: type, tree: Any, path: str, problems: list[str]) -> Any:
    """An instance of the dataclass, or None with the reasons appended to `problems`."""
    tree = {} if tree is None else tree  # `data:` with every key commented out
    if not isinstance(tree, dict):
        problems.append(f"{path}={_show(tree)}: is a section; put its keys below it, indented")
        return None
    num_before = len(problems)
    hints = get_type_hints(section)
    problems.extend(_unknown(key, value, path, list(hints)) for key, value in tree.items() if key not in hints)
    values: dict[str, Any] = {}
    for item in fields(section):
        here = _join(path, item.name)
        if is_dataclass(hints[item.name]):
            values[item.name] = _build(hints[item.name], tree.get(item.name), here, problems)
        elif item.name in tree:
            values[item.name] = _value(hints[item.name], tree[item.name], here, problems)
        elif _is_required(item):
            problems.append(f"{here}: missing; set it in the recipe or as {here}=<{_type_name(hints[item.name])}>")
    return section(**values) if len(problems) == num_before else None


def _unknown(key: Any, value: Any, path: str, known: list[str]) -> str:
    here = _join(path, str(key))
    close = difflib.get_close_matches(str(key), known, n=1)
    elsewhere = [name for name in _all_keys() if name.rsplit(".", 1)[-1] == key]
    guess = close or elsewhere
    advice = f"did you mean '{guess[0]}'?" if guess else f"known here: {', '.join(known)}"
    return f"{here}={_show(value)}: no such key; {advice}"


def _value(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The value as the field's type; int is accepted for float, a bool is never a number."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if isinstance(value, (list, tuple)) and parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        if isinstance(value, (list, tuple)) and len(value) == len(parts):
            pairs = enumerate(zip(parts, value, strict=True))
            return tuple(_value(part, item, f"{path}[{i}]", problems) for i, (part, item) in pairs)
    elif get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = _finite(value)
        if number is not None:
            return number
    elif type(value) is kind:
        return value
    found = "not a choice" if get_origin(kind) is Literal and isinstance(value, str) else _kind_of(value)
    problems.append(f"{path}={_show(value)}: {found}; expected {_type_name(kind)}")
    return value


def _finite(value: int | float | str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _kind_of(value: Any) -> str:
    names = {type(None): "empty", bool: "true/false", int: "an integer", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a mapping")


def _show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return textwrap.shorten(str(value), 60, placeholder=" ...")
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _type_name(part) for part in get_args(kind))}]"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}[kind]


# ------------------------------------------------------------------------------------------------------- dump and help


def dump_config(cfg: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that loads back to an equal object."""
    text: str = yaml.dump(_plain(asdict(cfg)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def describe() -> str:
    """Every key with its type, default and meaning, grouped by section, from the dataclasses themselves."""
    docs = _docs(schema)
    lines: list[str] = []
    for path, section in _sections(RunConfig, ""):
        lines += ["", f"{path}:" if path else "top level:"]
        hints = get_type_hints(section)
        for item in fields(section):
            if not is_dataclass(hints[item.name]):
                default = "required" if _is_required(item) else f"default {_default(item)}"
                lines.append(f"  {item.name:<26} {_type_name(hints[item.name])}; {default}")
                doc = docs.get((section.__name__, item.name), "")
                lines += textwrap.wrap(doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def _default(item: Field[Any]) -> str:
    if item.default == "":
        return '""'
    return _show(list(item.default) if isinstance(item.default, tuple) else item.default)


def _sections(section: type, path: str) -> Iterator[tuple[str, type]]:
    yield path, section
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from _sections(kind, _join(path, name))  # type: ignore[arg-type]


def _all_keys() -> list[str]:
    return [_join(path, item.name) for path, section in _sections(RunConfig, "") for item in fields(section)]


def _docs(module: types.ModuleType) -> dict[tuple[str, str], str]:
    """{(class, field): the string literal written under it}."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(item.target, ast.Name) and isinstance(below.value, ast.Constant)
                found[node.name, item.target.id] = " ".join(str(below.value.value).split())
    return found


def parse_args(argv: Sequence[str], program: str, summary: str) -> tuple[RunConfig, bool]:
    """The command line of every job: a recipe, then overrides. The second result tells whether only to check them."""
    examples = (
        "examples:\n"
        f"  {program} recipe.yaml\n"
        f"  {program} recipe.yaml train.num_steps=20 train.optimizer.lr=2e-6 data.eval=\n"
    )
    parser = argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog=f"{examples}\nkeys of a recipe, in the order of a run:\n\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, for example one of scripts/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument("--check", action="store_true", help="only tell whether this could run, and what is wrong")
    args = parser.parse_intermixed_args(argv)
    return load_config(args.recipe, args.overrides), args.check
