# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used are set aside: counted, listed with the reason, never replaced by others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rl.types import BadRow


class Quarantine:
    """Collects bad rows of a run; stops it when a batch has more than `max_fraction` of them."""

    def __init__(self, run_dir: str | Path, writes: bool, max_fraction: float):
        self.path = Path(run_dir) / "quarantine.jsonl"
        self.total = 0
        self._writes = writes
        self._max_fraction = max_fraction

    def add(self, bad: Sequence[BadRow], num_rows: int, where: str) -> None:
        """Set `bad` aside, out of `num_rows`. Called with the same arguments on every rank."""
        self.total += len(bad)
        if self._writes and bad:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)
        if num_rows and len(bad) > self._max_fraction * num_rows:
            listed = "\n".join(f"  {row.source}: {row.reason}" for row in bad[:20])
            raise ValueError(
                f"data.max_bad_fraction={self._max_fraction}: {len(bad)} of {num_rows} rows of {where} cannot be used; "
                f"mend them, or raise the limit to go on without them. All are listed in {self.path}\n{listed}"
            )
