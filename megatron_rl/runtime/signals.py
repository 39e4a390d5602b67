# SPDX-License-Identifier: Apache-2.0
"""Saving when asked to leave: SIGTERM (torchrun, Slurm, Kubernetes) and SIGUSR1 (Slurm's --signal) set a flag.

All ranks look at it together at the end of a step, save, and leave.
"""

from __future__ import annotations

import signal
from types import FrameType

from megatron_rl.runtime.parallel import reduce_max

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether somebody asked this job to stop. One per process, made in its main thread.

    The handlers stay until the process ends, and a second signal does nothing more: torchrun passes on a SIGTERM that
    Slurm has already sent to every process. It also sends one to the survivors of a rank that died, who must live long
    enough to say so. To stop at once, use Ctrl-C or SIGKILL.
    """

    def __init__(self) -> None:
        self._requested = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks. Collective."""
        return reduce_max(float(self._requested)) > 0
