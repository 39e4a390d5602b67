# SPDX-License-Identifier: Apache-2.0
"""What every job does around its work: explain its keys, read the recipe, refuse what cannot run, tell who failed.

All mistakes of a recipe are reported together, before any process group or device is touched.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from megatron_rl.config import schema as schema_module
from megatron_rl.config.checks import Job, check
from megatron_rl.config.io import C, dump_config, is_required, load_config, sections_of, show, type_name
from megatron_rl.config.schema import CacheConfig, JobConfig, RlConfig, SftConfig
from megatron_rl.errors import EXIT_USAGE, PeerLost
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.quiet import quiet_libraries
from megatron_rl.runtime.run_lock import held_run_folder

JOBS: Mapping[type[CacheConfig], Job] = {RlConfig: "rl", SftConfig: "sft", CacheConfig: "cache"}
_HELP_OF_KEYS: Mapping[Job, str] = {
    "rl": "keys of a recipe",
    "sft": "keys of a recipe",
    "cache": "what is read of a recipe for megatron_rl.train or megatron_rl.sft (their --help lists the other keys)",
}


CheckData = Callable[[JobConfig, int | None], None]
"""(configuration, records of each data set to read; None = as usual): raises ValueError for data that stop the job."""


def run_job(
    argv: Sequence[str],
    schema: type[C],
    program: str,
    summary: str,
    body: Callable[[C], object],
    check_data: CheckData,
) -> None:
    """Run `body` with the checked configuration; a ValueError is the user's to mend and ends without a traceback.

    With `--check` it calls `check_data` instead. `schema` is that of the job: RlConfig, SftConfig, or CacheConfig,
    which takes a recipe for either of the two.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        _check_data_package()
        cfg, only_check, num_records = parse_args(argv, schema, program, summary)
        assert isinstance(cfg, JobConfig)
        check(cfg, world, JOBS[schema])
        if only_check and rank == 0:
            check_data(cfg, num_records)
    except ValueError as error:
        _report(error, rank)
        if "--check" in argv and rank == 0:
            sys.stderr.write("this run cannot start\n")
        raise SystemExit(EXIT_USAGE) from None
    if only_check:
        if rank == 0:
            sys.stdout.write(f"nothing stands in the way of this run on {world} rank{'s' if world > 1 else ''}\n")
        return
    quiet_libraries()
    with ExitStack() as stack:
        if rank == 0:
            _enter_run_folder(cfg, stack)
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {cfg.run_dir}: {world} ranks; loading libraries ...\n")
        _run_body(cfg, body, rank)


def _enter_run_folder(cfg: CacheConfig, stack: ExitStack) -> None:
    """Hold the run folder until `stack` is left, and only then write into it."""
    try:
        stack.enter_context(held_run_folder(Path(cfg.run_dir)))
    except ValueError as error:
        _report(error, rank=0)
        raise SystemExit(EXIT_USAGE) from None
    write_atomically(Path(cfg.run_dir) / "config.yaml", dump_config(cfg).encode())


def _run_body(cfg: C, body: Callable[[C], object], rank: int) -> None:
    assert isinstance(cfg, CacheConfig)
    try:
        body(cfg)
    except ValueError as error:
        _keep_traceback(cfg, rank)
        _report(error, rank)
        raise SystemExit(EXIT_USAGE) from None
    except PeerLost as error:
        from megatron_rl.runtime.watchdog import stop_process

        stop_process(f"rank {rank}: {error}")  # at once: an orderly exit could wait for the dead in a collective


def _report(error: ValueError, rank: int) -> None:
    if rank == 0:
        sys.stderr.write(f"{error}\n")


def _keep_traceback(cfg: CacheConfig, rank: int) -> None:
    """A ValueError is usually the user's to mend; where it is a library's, its traceback is wanted after all."""
    path = Path(cfg.run_dir) / f"error_rank{rank}.txt"
    write_atomically(path, traceback.format_exc().encode())
    if rank == 0:  # the others usually raise the same one, and what rank 0 says is to be the last on the screen
        sys.stderr.write(f"stopped by an error; where it was raised stands in {path}\n")


def _check_data_package() -> None:
    """`data` is a common name: make sure that Python found ours."""
    import data

    ours = Path(__file__).resolve().parents[2] / "data"
    found = Path(data.__file__ or "").resolve().parent
    if found != ours:
        raise ValueError(
            f"PYTHONPATH: the package `data` is {found}, not {ours}; set PYTHONSAFEPATH=1 or use scripts/launch.sh"
        )


# ---------------------------------------------------------------------------------------------- arguments and help


def parse_args(argv: Sequence[str], schema: type[C], program: str, summary: str) -> tuple[C, bool, int | None]:
    """The command line of every job: a recipe, then overrides. The second result tells whether only to check them, the
    third how many records of each data set to read then."""
    examples = (
        "examples:\n"
        f"  {program} recipe.yaml\n"
        f"  {program} recipe.yaml data.train=rows.jsonl train.prompts_per_step=32 data.eval=\n"
    )
    parser = argparse.ArgumentParser(
        prog=program,
        description=summary,
        epilog=f"{examples}\n{_HELP_OF_KEYS[JOBS[schema]]}:\n\n{describe(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, for example one of scripts/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    parser.add_argument("--check", action="store_true", help="only tell whether this could run, and what is wrong")
    rows_help = "with --check: read N records of each data set and open all their media; 0 = all records"
    parser.add_argument("--check-rows", type=int, metavar="N", help=rows_help)
    args = parser.parse_intermixed_args(argv)
    return load_config(args.recipe, schema, args.overrides), args.check, args.check_rows


def describe(job: type) -> str:
    """Every key of a schema with its type, default and meaning, grouped by section, from the dataclasses themselves."""
    docs = _docs(schema_module)
    lines: list[str] = []
    for path, section in sections_of(job):
        lines += ["", f"{path}:" if path else "top level:"]
        hints = get_type_hints(section)
        for item in fields(section):
            if not is_dataclass(hints[item.name]):
                default = "required" if is_required(item) else f"default {_default(item)}"
                lines.append(f"  {item.name:<26} {type_name(hints[item.name])}; {default}")
                doc = next(
                    (docs[c.__name__, item.name] for c in section.__mro__ if (c.__name__, item.name) in docs), ""
                )
                lines += textwrap.wrap(doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def _default(item: Field[Any]) -> str:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if default == "":
        return '""'
    return show(list(default) if isinstance(default, tuple) else default)


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
