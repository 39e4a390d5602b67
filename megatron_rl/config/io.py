# SPDX-License-Identifier: Apache-2.0
"""Recipes on disk <-> the dataclasses of schema.py: strict keys and types, `key.path=value` overrides.

Every problem of a recipe is reported in one message. YAML is read by its 1.2 rules, so that `off` is a word and
`1e-6` a number; what `dump_config` writes loads back to an equal object. An override of a text field is taken as it is.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from megatron_rl.config.moved_keys import advice_for, is_section_of_another_job
from megatron_rl.config.schema import CacheConfig, JobConfig, RlConfig, SftConfig
from megatron_rl.errors import raise_all

C = TypeVar("C", bound=CacheConfig)

PATHS = frozenset(
    "run_dir model.hf model.weights_from data.train data.eval data.media_root data.format_prompt data.manifest "
    "data.cache_dir rollout.save_to rollout.replay_from reward.name".split()
)
"""Text fields that name files or folders: `~` is the home folder there."""

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


def _apply_override(
    tree: dict[str, Any], text: str, mappings: Collection[str], texts: Collection[str]
) -> Iterator[str]:
    """Set one `key.path=value` in the tree; yields a problem when that cannot be done. The keys in `mappings` take a
    whole `{name: value}` as well, those in `texts` whatever stands there."""
    path, equals, raw = text.partition("=")
    if not equals or not path:
        yield f"{text}: not an override; write key.path=value"
        return
    try:
        value = _unquoted(raw) if path in texts else yaml.load(raw, Loader=_Loader) if raw else ""
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
    if isinstance(value, dict) and path not in mappings:
        yield f"{text}: an override sets one value; write {path}.<key>=value"
        return
    tree[key] = value


def _unquoted(raw: str) -> str:
    """The text itself (YAML would cut it at ` #`), without the quotes of a text that is quoted as a whole."""
    if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"":
        try:
            value = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:
            return raw
        return value if isinstance(value, str) else raw
    return raw


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------- tree -> dataclasses


def load_config(recipe: str, schema: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a recipe, apply the overrides in order, and check every key and type (not yet the values: checks.py).

    `schema` is that of the job. With CacheConfig the recipe is one for RL or SFT, and is read as such.
    """
    tree = _read_recipe(recipe)
    mappings, texts = _keys_that_are(dict), _keys_that_are(str)
    problems = [problem for text in overrides for problem in _apply_override(tree, text, mappings, texts)]
    job = _job_of(tree) if schema is CacheConfig else schema
    config = _build(job, job, tree, "", problems)
    raise_all(problems, f"recipe {recipe}")
    assert isinstance(config, schema)
    return config


def _keys_that_are(kind: type) -> list[str]:
    """Keys of any job whose value is a text (str), or a mapping of its own (dict)."""
    jobs = (RlConfig, SftConfig)
    hints = [(path, get_type_hints(section)) for job in jobs for path, section in sections_of(job)]
    found = [join(path, name) for path, hint in hints for name, of in hint.items() if (get_origin(of) or of) is kind]
    return list(dict.fromkeys(found))


def _job_of(tree: dict[str, Any]) -> type[JobConfig]:
    """The job that a recipe is for: SFT where `train` has a key that only SFT has, else RL."""
    train = tree.get("train")
    only_sft = set(keys_of(SftConfig)) - set(keys_of(RlConfig))
    return SftConfig if isinstance(train, dict) and any(f"train.{key}" in only_sft for key in train) else RlConfig


def _build(job: type, section: type, tree: Any, path: str, problems: list[str]) -> Any:
    """An instance of the dataclass, or None with the reasons appended to `problems`."""
    tree = {} if tree is None else tree  # `data:` with every key commented out
    if not isinstance(tree, dict):
        problems.append(f"{path}={show(tree)}: is a section; put its keys below it, indented")
        return None
    num_before = len(problems)
    hints = get_type_hints(section)
    for key, value in tree.items():
        if key not in hints:
            problems.extend(_unknown(job, key, value, path, list(hints)))
    values: dict[str, Any] = {}
    for item in fields(section):
        here = join(path, item.name)
        if is_dataclass(hints[item.name]):
            values[item.name] = _build(job, hints[item.name], tree.get(item.name), here, problems)
        elif item.name in tree:
            values[item.name] = _value(hints[item.name], tree[item.name], here, problems)
        elif is_required(item):
            problems.append(f"{here}: missing; set it in the recipe or as {here}=<{type_name(hints[item.name])}>")
    return section(**values) if len(problems) == num_before else None


def _unknown(job: type, key: Any, value: Any, path: str, known: list[str]) -> Iterator[str]:
    here = join(path, str(key))
    if is_section_of_another_job(job, here) and isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _unknown(job, name, item, here, known)
        return
    advice = advice_for(job, here, value)
    if advice is None:
        close = difflib.get_close_matches(str(key), known, n=1)
        elsewhere = [name for name in keys_of(job) if name.rsplit(".", 1)[-1] == key]
        guess = close or elsewhere
        advice = "no such key; " + (f"did you mean '{guess[0]}'?" if guess else f"known here: {', '.join(known)}")
    yield f"{here}={show(value)}: {advice}"


def _value(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The value as the field's type; int is accepted for float, a bool is never a number."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if isinstance(value, (list, tuple)) and parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        if isinstance(value, (list, tuple)) and len(value) == len(parts):
            pairs = enumerate(zip(parts, value, strict=True))
            return tuple(_value(part, item, f"{path}[{i}]", problems) for i, (part, item) in pairs)
    elif get_origin(kind) is dict:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            of = get_args(kind)[1]
            return {name: _value(of, item, f"{path}.{name}", problems) for name, item in value.items()}
    elif get_origin(kind) is Literal:
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = _finite(value)
        if number is not None:
            return number
    elif isinstance(value, str) and kind is str and path in PATHS:
        return _with_home(value, path, problems)
    elif type(value) is kind:
        return value
    found = "not a choice" if get_origin(kind) is Literal and isinstance(value, str) else _kind_of(value)
    problems.append(f"{path}={show(value)}: {found}; expected {type_name(kind)}")
    return value


def _with_home(value: str, path: str, problems: list[str]) -> str:
    """The value with `~` and `~name` replaced by the home folders; data sets have commas between."""
    parts = []
    for part in value.split(",") if path in ("data.train", "data.eval") else [value]:
        name = part.lstrip()
        expanded = os.path.expanduser(name)
        if expanded.startswith("~"):
            problems.append(f"{path}={value}: there is no home folder of that name; write ./{name} for a name in here")
        parts.append(part[: len(part) - len(name)] + expanded)
    return ",".join(parts)


def _finite(value: int | float | str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def sections_of(section: type, path: str = "") -> Iterator[tuple[str, type]]:
    """(dotted path, dataclass) of a schema and of every section in it."""
    yield path, section
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from sections_of(kind, join(path, name))


def keys_of(job: type) -> list[str]:
    """Dotted paths of every key and section of a schema."""
    return [join(path, item.name) for path, section in sections_of(job) for item in fields(section)]


def is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _kind_of(value: Any) -> str:
    names = {type(None): "empty", bool: "true/false", int: "an integer", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a mapping")


def show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return textwrap.shorten(str(value), 60, placeholder=" ...")
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if part is Ellipsis else type_name(part) for part in get_args(kind))}]"
    if get_origin(kind) is dict:
        return "{" + ": ".join(type_name(part) for part in get_args(kind)) + "}"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}[kind]


# --------------------------------------------------------------------------------------------- dataclasses -> YAML


def dump_config(cfg: CacheConfig) -> str:
    """The whole configuration, defaults included, as YAML that loads back to an equal object."""
    text: str = yaml.dump(_plain(asdict(cfg)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
