# SPDX-License-Identifier: Apache-2.0
"""torchrun without its report on its children: what the ranks say themselves is the last thing on the screen.

    python -m megatron_rl.runtime.launcher [options of torchrun] --module MODULE [arguments]

Started by scripts/launch.sh. Ends with 0, with EXIT_USAGE where a user's mistake ended the job, with 128 + the number
of a signal to the launcher, with 1 otherwise.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_rl.errors import EXIT_USAGE
from megatron_rl.runtime.watchdog import EXIT_CODE

HAVE_SPOKEN = (EXIT_USAGE, EXIT_CODE)  # a rank that ends so has said why
LOGGERS = {"multiprocessing.api": logging.CRITICAL, "agent.server.api": logging.ERROR}


def main(argv: Sequence[str]) -> int:
    """Start the ranks of this node and wait for them; the status to end with."""
    for name, level in LOGGERS.items():
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(level)
    try:
        run.main(list(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in HAVE_SPOKEN:
            return EXIT_USAGE if failure.exitcode == EXIT_USAGE else 1
        sys.stderr.write(f"rank {rank} (pid {failure.pid}) {how_it_ended(failure.exitcode)}\n")
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def how_it_ended(exitcode: int) -> str:
    """Of a process, by the status that its parent got; negative for a signal."""
    if exitcode >= 0:
        return f"ended with status {exitcode}; what it said stands above"
    name = signal.Signals(-exitcode).name
    why = "; was memory short? (dmesg names the processes that the kernel ended)" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
