# SPDX-License-Identifier: Apache-2.0
"""Print what a run learned, from its summary.json: `show_summary.py RUN_DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LINES = (
    ("accuracy on held-out videos, before", "start_accuracy", "{:.1%}"),
    ("accuracy on held-out videos, after", "heldout_accuracy", "{:.1%}"),
    ("accuracy with the frames blanked", "blind_accuracy", "{:.1%}"),
    ("steps", "num_steps", "{}"),
    ("largest log-prob gap, trainer vs vLLM", "max_logprob_gap", "{:.1e}"),
    ("bytes moved per sync / least possible", "sync_bytes_over_minimum", "{:.2f}"),
)
FILES = (
    ("curves of reward and log-prob gap", "curves.png"),
    ("metrics, one line a step", "metrics.jsonl"),
    ("everything above, as JSON", "summary.json"),
    ("resolved configuration", "config.yaml"),
    ("checkpoints", "checkpoints"),
)


def render(run_dir: Path, summary: dict[str, Any]) -> str:
    lines = [f"{label:<40}{form.format(summary[key])}" for label, key, form in LINES if summary.get(key) is not None]
    seconds = {phase: spent for phase, spent in summary.get("seconds", {}).items() if isinstance(spent, (int, float))}
    if seconds:
        spent = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
        lines.append(f"{'seconds':<40}{spent}")
    places = [(label, run_dir / name) for label, name in FILES]
    if summary.get("hf_export"):
        places.append(("Hugging Face folder", Path(summary["hf_export"])))
    lines += ["", *(f"{label:<40}{path}" for label, path in places if path.exists())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what a run learned and where its results lie.")
    parser.add_argument("run_dir", type=Path, help="run_dir of a finished run")
    args = parser.parse_args()
    path = args.run_dir / "summary.json"
    if not path.is_file():
        parser.error(f"{path}: no such file; the run has not finished")
    print(render(args.run_dir, json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
