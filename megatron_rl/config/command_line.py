# SPDX-License-Identifier: Apache-2.0
"""What every job does around its work: read the recipe, refuse what cannot run, tell who failed.

All mistakes of a recipe are reported together, before any process group or device is touched.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.config.checks import Job, check
from megatron_rl.config.io import dump_config, parse_args
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import PeerLost
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.quiet import quiet_libraries

EXIT_USAGE = 2


def run_job(argv: Sequence[str], job: Job, program: str, summary: str, body: Callable[[RunConfig], None]) -> None:
    """Run `body` with the checked configuration; a ValueError is the user's to mend and ends without a traceback."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        _check_data_package()
        cfg, only_check = parse_args(argv, program, summary)
        check(cfg, world, job)
    except ValueError as error:
        _report(error, rank)
        raise SystemExit(EXIT_USAGE) from None
    if only_check:
        if rank == 0:
            sys.stdout.write(f"nothing stands in the way of this run on {world} rank{'s' if world > 1 else ''}\n")
        return
    quiet_libraries()
    if rank == 0:
        write_atomically(Path(cfg.run_dir) / "config.yaml", dump_config(cfg).encode())
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


def _keep_traceback(cfg: RunConfig, rank: int) -> None:
    """A ValueError is usually the user's to mend; where it is a library's, its traceback is wanted after all."""
    path = Path(cfg.run_dir) / f"error_rank{rank}.txt"
    write_atomically(path, traceback.format_exc().encode())
    sys.stderr.write(f"rank {rank}: stopped by an error; where it was raised stands in {path}\n")


def _check_data_package() -> None:
    """`data` is a common name: make sure that Python found ours."""
    import data

    ours = Path(__file__).resolve().parents[2] / "data"
    found = Path(data.__file__ or "").resolve().parent
    if found != ours:
        raise ValueError(
            f"PYTHONPATH: the package `data` is {found}, not {ours}; set PYTHONSAFEPATH=1 or use scripts/launch.sh"
        )
