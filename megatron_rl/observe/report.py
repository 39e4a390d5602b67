# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: `curves.png`, `summary.json` and a table of sample rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from megatron_rl.observe.metric_log import METRICS_FILE, read_metrics
from megatron_rl.runtime.files import write_atomically, written_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: the metrics that match `patterns`; a metric of `points` is drawn as dots joined by a line."""

    title: str
    patterns: tuple[str, ...]
    points: tuple[str, ...] = ()
    log_scale: bool = False


PANELS = (
    Panel("reward", ("critic/score/mean", "eval/*accuracy*"), points=("eval/*",)),
    Panel("loss of the reference answers", ("sft/nll",)),
    Panel(
        "trainer / rollout log-probability gap",
        ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"),
        log_scale=True,
    ),
)


@dataclass(frozen=True, slots=True)
class SampleRollout:
    """One line of the table at the end of a run."""

    question: str
    response: str
    answer: str
    reward: float


def plot_curves(run_dir: str | Path) -> Path | None:
    """Draw `<run_dir>/curves.png` from metrics.jsonl; None when nothing that belongs into a plot was logged."""
    from matplotlib.figure import Figure

    rows = read_metrics(Path(run_dir) / METRICS_FILE)
    filled = [(panel, series) for panel in PANELS if (series := _series(rows, panel))]
    if not filled:
        return None
    figure = Figure(figsize=(6 * len(filled), 4), layout="constrained")
    for axes, (panel, series) in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        _draw(axes, panel, series)
    path = Path(run_dir) / "curves.png"
    with written_atomically(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    return path


def _series(rows: Sequence[Mapping[str, float]], panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """{metric: (steps, values)} of what a panel shows; a value that is not finite leaves a hole in its line."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if any(fnmatchcase(name, pattern) for pattern in panel.patterns):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value if math.isfinite(value) else math.nan)
    return found


def _draw(axes: Axes, panel: Panel, series: Mapping[str, tuple[list[float], list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, (steps, values) in series.items():
        is_points = any(fnmatchcase(name, pattern) for pattern in panel.points) or len(steps) == 1
        axes.plot(steps, values, marker="o" if is_points else "", label=name)
    if panel.log_scale and any(value > 0 for _, values in series.values() for value in values):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()


def rollout_table(rollouts: Sequence[SampleRollout]) -> Table:
    """Sample rollouts, texts in full."""
    table = Table(title="sample rollouts", show_lines=True)
    for header in ("question", "response", "answer"):
        table.add_column(header, overflow="fold")
    table.add_column("reward", justify="right", overflow="fold")
    for rollout in rollouts:
        texts = (Text(text.strip()) for text in (rollout.question, rollout.response, rollout.answer))
        table.add_row(*texts, f"{rollout.reward:.3f}")
    return table


def write_summary(run_dir: str | Path, values: Mapping[str, object]) -> Path:
    """Write `<run_dir>/summary.json` in one piece: readers see the old file or the new one, never half of one."""
    path = Path(run_dir) / "summary.json"
    write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    return path
