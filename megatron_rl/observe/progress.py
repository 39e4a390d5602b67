# SPDX-License-Identifier: Apache-2.0
"""Which phase of which step is running, how long each took, and how long the rest will take."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LONG_PHASE_S = 10.0


class Progress:
    """Tells which phase of which step is running and how long the rest will take; measures the phases.

    A terminal gets one line that rewrites itself, a log file one line per step and one per long phase, when it begins.
    With `enabled=False` it only measures. `on_phase(step, name)` is told of every phase; `synchronize` waits for the
    device before a clock is read.

        progress = Progress(num_steps=20, enabled=rank == 0)
        with progress.phase(step, "rollout"):
            ...
        metrics |= progress.end_step(step, note="reward 0.41")  # {"timing_s/rollout": ..., "timing_s/step": ...}
    """

    def __init__(
        self,
        num_steps: int,
        enabled: bool,
        stream: TextIO | None = None,
        on_phase: Callable[[int, str], None] = lambda step, name: None,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self._num_steps = num_steps
        self._on_phase = on_phase
        self._synchronize = synchronize
        self._stream = (stream or sys.stderr) if enabled else None
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._phases: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._steps: list[float] = []
        self._step_start = time.perf_counter()

    @contextmanager
    def phase(self, step: int, name: str) -> Iterator[None]:
        """Measure one phase; a phase entered twice in a step adds up."""
        self._on_phase(step, name)
        if self._is_terminal or self._last.get(name, LONG_PHASE_S) >= LONG_PHASE_S:
            self._write(f"{self._head(step, self._num_steps - step)} {name} ...")
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._last[name] = time.perf_counter() - start
            self._phases[name] = self._phases.get(name, 0.0) + self._last[name]

    def end_step(self, step: int, note: str = "") -> dict[str, float]:
        """Seconds by phase since the last end_step, as timing_s/* metrics; `note` is printed behind the step."""
        now = time.perf_counter()
        self._steps.append(now - self._step_start)
        self._step_start = now
        seconds = {**self._phases, "step": self._steps[-1]}
        self._phases = {}
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "step")
        head = self._head(step, self._num_steps - step - 1)
        self._write(f"{head} {note}{'; ' * bool(note)}{self._steps[-1]:.1f} s ({parts})", last=True)
        return {f"timing_s/{name}": value for name, value in seconds.items()}

    def _head(self, step: int, num_left: int) -> str:
        usual = self._steps[1:] or self._steps  # the first step compiles and warms up
        left = f" [{duration(sum(usual) / len(usual) * num_left)} left]" if usual and num_left else ""
        return f"step {step + 1}/{self._num_steps}{left}"

    def _write(self, text: str, last: bool = False) -> None:
        if self._stream is None:
            return
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[2K" + (text if last else text[:width]) + "\n" * last)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
