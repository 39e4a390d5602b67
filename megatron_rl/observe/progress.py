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

    A terminal gets one line that rewrites itself, a log file one line per step and one per long phase, when it begins;
    each begins with the time of day. With `enabled=False` it only measures. `on_phase(step, name)` is told of every
    phase; `synchronize` waits for the device before a clock is read.

        progress = Progress(num_steps=20, enabled=rank == 0)
        with progress.starting("model"):
            ...
        started = progress.begin_steps()  # {"timing_s/startup": ...}
        with progress.phase(step, "rollout"):
            ...
        metrics |= progress.end_step(step, note="reward 0.41")  # {"timing_s/rollout": ..., "timing_s/step": ...}
        with progress.phase(step, "save_checkpoint"):
            ...
        metrics |= progress.extend_step("save_checkpoint")  # {"timing_s/save_checkpoint": ..., "timing_s/step": ...}
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
        self._is_starting = False
        self._step_start = time.perf_counter()

    @contextmanager
    def starting(self, name: str) -> Iterator[None]:
        """Measure a phase of what comes before the first step."""
        self._is_starting = True
        with self.phase(0, name):
            yield

    def begin_steps(self) -> dict[str, float]:
        """What came before belongs to no step: seconds since the job began, as a metric."""
        seconds = time.perf_counter() - self._step_start
        if self._is_starting:
            self._is_starting = False
            self.say(f"start {seconds:.1f} s ({self._spent()})")
        self._phases = {}
        self._step_start += seconds
        return {"timing_s/startup": seconds}

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text, last=True)

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
        head = self._head(step, self._num_steps - step - 1)
        self.say(f"{head} {note}{'; ' * bool(note)}{self._steps[-1]:.1f} s ({self._spent()})")
        self._phases = {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}

    def extend_step(self, name: str) -> dict[str, float]:
        """Book a phase that came after `end_step` on the step that has ended: the timing_s/* metrics that change."""
        now, seconds = time.perf_counter(), self._phases.pop(name)
        self._steps[-1] += now - self._step_start
        self._step_start = now
        return {f"timing_s/{name}": seconds, "timing_s/step": self._steps[-1]}

    def _spent(self) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in self._phases.items())

    def _head(self, step: int, num_left: int) -> str:
        if self._is_starting:
            return "start"
        usual = self._steps[1:] or self._steps  # the first step compiles and warms up
        left = f" [{duration(sum(usual) / len(usual) * num_left)} left]" if usual and num_left else ""
        return f"step {step + 1}/{self._num_steps}{left}"

    def _write(self, text: str, last: bool = False) -> None:
        if self._stream is None:
            return
        text = f"{clock()} {text}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[2K" + (text if last else text[:width]) + "\n" * last)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def clock() -> str:
    """The time of day, as lines of a log begin with it."""
    return time.strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
