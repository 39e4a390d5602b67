# SPDX-License-Identifier: Apache-2.0
"""How long the main thread has been in its phase, and where it is: a thread that is stuck must not look alive."""

from __future__ import annotations

import sys
import threading
import traceback
from dataclasses import dataclass

FLOOR_S = 600.0
MULTIPLE = 4.0
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "megatron_rl/runtime/watchdog.py")


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What the main thread does: the collective it waits in ("" for none), and its stack, outermost frame first."""

    collective: str
    stack: str


def main_thread_is() -> Whereabouts:
    """Of this process, as seen from another thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
    waiting = [f.name for f in frames if f.filename.replace("\\", "/").endswith(COLLECTIVES) and f.name != "wrapper"]
    return Whereabouts(waiting[0] if waiting else "", "".join(frames.format()))


class PhaseClock:
    """Counts the looks of a watching thread since the main thread entered its phase.

    Counted, not timed: after a pause of this very process, nothing has been stuck yet. A phase is overdue once, when it
    lasts longer than FLOOR_S and MULTIPLE times the longest phase of its name.
    """

    def __init__(self, interval_s: float, floor_s: float = FLOOR_S):
        self._interval_s, self._floor_s = interval_s, floor_s
        self.now = (0, "start")
        self._looks, self._told = 0, False
        self._longest: dict[str, float] = {}

    def enter(self, step: int, phase: str) -> None:
        """The main thread begins with `phase` of `step`."""
        name = self.now[1]
        self._longest[name] = max(self._longest.get(name, 0.0), self.seconds)
        self.now, self._looks, self._told = (step, phase), 0, False

    @property
    def where(self) -> str:
        return f"phase '{self.now[1]}' of step {self.now[0]}"

    @property
    def seconds(self) -> float:
        """In the present phase."""
        return self._looks * self._interval_s

    def look(self) -> None:
        """Called every `interval_s` by the watching thread."""
        self._looks += 1

    def overdue(self) -> str | None:
        """How long the phase has lasted, against the longest before; None if that is usual, or was told already."""
        longest = self._longest.get(self.now[1], 0.0)
        if self._told or self.seconds <= max(self._floor_s, MULTIPLE * longest):
            return None
        self._told = True
        usual = f"longest before: {_minutes(longest)}" if longest else "for the first time"
        return f"in {self.where} for {_minutes(self.seconds)} ({usual})"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
