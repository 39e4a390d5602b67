# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used are set aside: counted, listed with the reason, never replaced by others."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rl.types import BadRow


class Quarantine:
    """Collects bad rows of a run; stops it when a batch has more than `max_fraction` of them."""

    def __init__(self, run_dir: str | Path, writes: bool, max_fraction: float):
        self.path = Path(run_dir) / "quarantine.jsonl"
        self.counts = {"row": 0, "media": 0, "overlong": 0}
        self._writes = writes
        self._max_fraction = max_fraction

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def metrics(self) -> dict[str, float]:
        """Rows set aside since the run (re)started: all, and by what was wrong."""
        kinds = {"row": "data/bad_rows", "media": "data/bad_media", "overlong": "data/overlong"}
        return {"data/quarantined": float(self.total)} | {kinds[kind]: float(n) for kind, n in self.counts.items()}

    def note(self, text: str) -> None:
        """Say something about the data that is no row's fault: once, on one rank, and in the list."""
        if self._writes:
            sys.stderr.write(f"note: {text}\n")
            self._append([{"source": "", "reason": text, "kind": "note"}])

    def add(
        self, bad: Sequence[BadRow], num_rows: int, where: str, length_setting: str = "data.max_prompt_tokens"
    ) -> None:
        """Set `bad` aside, out of `num_rows`; `length_setting` is what the long ones are over. Called with the same
        arguments on every rank.

        Prompts that are too long are a matter of taste, not of faulty data: they stop a run only where nothing is left.
        """
        for row in bad:
            self.counts[row.kind] += 1
        if self._writes and bad:
            self._append([asdict(row) for row in bad])
        faulty = [row for row in bad if row.kind != "overlong"]
        listed = "\n".join(f"  {row.source}: {row.reason}" for row in (faulty or bad)[:20])
        if num_rows and len(faulty) > self._max_fraction * num_rows:
            raise ValueError(
                f"data.max_bad_fraction={self._max_fraction}: {len(faulty)} of {num_rows} rows of {where} cannot be "
                f"used; mend them, or raise the limit to go on without them. All are listed in {self.path}\n{listed}"
            )
        if bad and len(bad) == num_rows:
            num_long = len(bad) - len(faulty)
            setting, why = "data.max_bad_fraction", "none can be used; mend them"
            if num_long:
                setting, why = length_setting, f"{num_long} are too long; raise it, or shorten them"
            raise ValueError(
                f"{setting}: none of the {num_rows} rows of {where} is left, {why}. All are listed in {self.path}\n"
                f"{listed}"
            )

    def _append(self, lines: Sequence[Mapping[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
