# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: `metrics.jsonl`, Weights & Biases, TensorBoard, and a progress line with the time left.

`metrics.jsonl` is the record: one JSON object a step, on disk as soon as the step is over, continued after a resume.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

METRICS_FILE = "metrics.jsonl"
LONG_PHASE_S = 10.0


class MetricLog:
    """The metric sinks of one run. Only rank 0 writes; on the others every method does nothing."""

    def __init__(
        self,
        run_dir: str | Path,
        rank0: bool,
        wandb: Literal["off", "offline", "online"],
        project: str,
        tensorboard: bool,
        config: Mapping[str, object],
    ):
        self.path = Path(run_dir) / METRICS_FILE
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not rank0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        if wandb != "off":
            self._wandb = _start_wandb(self.path.parent, wandb, project, config)
        if tensorboard:
            self._tensorboard = _start_tensorboard(self.path.parent, purge_step=None)

    def resume_from(self, step: int) -> None:
        """Forget what was logged for `step` and later (0: everything): those steps are about to be made again."""
        if self._file is None:
            return
        self._file.close()
        kept = [row for row in read_metrics(self.path) if row["step"] < step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _start_tensorboard(self.path.parent, purge_step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step to every sink."""
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in sorted(values.items())}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close every sink; may be called again."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            _finish_wandb(self._wandb)
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file = self._wandb = self._tensorboard = None


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl in order; a last line that a crash cut short (no newline) is left out."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def _start_tensorboard(run_dir: Path, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def _start_wandb(run_dir: Path, mode: Literal["offline", "online"], project: str, config: Mapping[str, object]) -> Any:
    """Every start of a run is a wandb run of its own; those that resumed each other share the group."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    name = run_dir.resolve().name
    return wandb.init(
        dir=str(run_dir), mode=mode, project=project, name=name, group=name, config=dict(config), settings=settings
    )


def _finish_wandb(run: Any) -> None:
    """`finish` returns while wandb's own process is still writing the file; `teardown` waits until it has left."""
    import wandb

    run.finish()
    wandb.teardown()


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
