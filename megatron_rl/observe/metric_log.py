# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: `metrics.jsonl`, Weights & Biases, TensorBoard.

`metrics.jsonl` is the record: one JSON object a step, on disk as soon as the step is over, continued after a resume.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron_rl.runtime.files import write_atomically

METRICS_FILE = "metrics.jsonl"


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
        self._last: tuple[int, dict[str, float]] = (0, {})
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not rank0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open(None)
        if wandb != "off":
            self._wandb = _start_wandb(self.path.parent, wandb, project, config)
        if tensorboard:
            self._tensorboard = _start_tensorboard(self.path.parent, purge_step=None)

    def resume_from(self, step: int) -> None:
        """Forget what was logged for `step` and later (0: everything): those steps are about to be made again.

        A run is not lost for its log: a damaged one is set aside, told, and its readable rows are kept.
        """
        if self._file is None:
            return
        self._file.close()
        kept = [row for row in self._readable_rows() if row["step"] < step]
        write_atomically(self.path, "".join(_line(row) for row in kept).encode())
        self._open(kept[-1] if kept else None)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _start_tensorboard(self.path.parent, purge_step=step)

    def _open(self, last: Mapping[str, float] | None) -> None:
        """`last` is the row at the end of the file, if it may be extended."""
        self._file = self.path.open("a", encoding="utf-8")
        row = dict(last) if last else {}
        self._last = (self._file.tell() - len(_line(row)) if row else 0, row)

    def _readable_rows(self) -> list[dict[str, float]]:
        try:
            return read_metrics(self.path)
        except ValueError as error:
            kept = _set_aside(self.path)
            rows = [row for line in kept.read_bytes().split(b"\n")[:-1] if (row := _row(line)) is not None]
            sys.stderr.write(f"{error}: kept as {kept.name}; its {len(rows)} readable lines stay in {self.path.name}\n")
            return rows

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step to every sink."""
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in sorted(values.items())}
        self._last = (self._file.tell(), {"step": step, **numbers})
        self._file.write(_line(self._last[1]))
        self._file.flush()
        self._send(step, numbers)

    def extend(self, values: Mapping[str, float]) -> None:
        """More metrics of the step that was logged last, or better ones."""
        start, row = self._last
        if self._file is None or not row:
            return
        numbers = {name: float(value) for name, value in values.items()}
        step = int(row["step"])
        rest = {name: value for name, value in {**row, **numbers}.items() if name != "step"}
        old = self.path.stat().st_size - start
        self._last = (start, {"step": step, **dict(sorted(rest.items()))})
        with self.path.open("r+b") as file:  # one write: a process that dies leaves the old row or the new one
            file.seek(start)
            file.write(_line(self._last[1], at_least=old).encode())
        self._file.seek(0, 2)
        self._send(step, numbers)

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)
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


def _line(row: Mapping[str, float], at_least: int = 0) -> str:
    """`at_least` characters long, with blanks at the end."""
    return json.dumps(row).ljust(at_least - 1) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl in order; a last line that a crash cut short (no newline) is left out.

    Raises ValueError that names the first line that is damaged.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        if (row := _row(line)) is None:
            raise ValueError(f"{path}: line {number} is damaged; mend or remove that line")
        rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _set_aside(path: Path) -> Path:
    """Give a file a name of its own in its folder."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    return path.rename(path.with_name(f"{path.name}.damaged-{number}"))


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
