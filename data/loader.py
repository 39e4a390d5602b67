# SPDX-License-Identifier: Apache-2.0
"""The endless, resumable order in which rows are used. Pure arithmetic, so every rank has the same one without talking.

Row number `p` of the stream (p = epoch * len(rows) + position) has prompt id `p`: unique over the whole run.
Batches run over the end of an epoch; no row is lost because the batch size does not divide the dataset.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from megatron_rl.errors import raise_all
from megatron_rl.types import Row


class RowLoader:
    """Deals rows in batches, forever. Its whole state is a position."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int, shuffle: bool):
        if not rows:
            raise ValueError("data.train: no usable row in the file; see quarantine.jsonl for the reasons")
        assert batch_size >= 1
        self.batch_size = batch_size
        self._rows = tuple(rows)
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint(rows)
        self._epoch = 0
        self._offset = 0
        self._order = self._epoch_order()

    def next_batch(self) -> list[tuple[int, Row]]:
        """The next `batch_size` rows, each with its prompt id."""
        return [self._next() for _ in range(self.batch_size)]

    def state_dict(self) -> dict[str, int | bool | str]:
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_rows": len(self._rows),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Go on after the row that was dealt last. Refuses a state that belongs to another order of rows."""
        problems = []
        if state["fingerprint"] != self._fingerprint:
            problems.append(
                f"data.train: the checkpoint was made with another dataset ({state['num_rows']} rows, now "
                f"{len(self._rows)}); use the same file, or start a new run_dir"
            )
        if state["seed"] != self._seed:
            problems.append(f"seed={self._seed}: the checkpoint was made with seed={state['seed']}; use that")
        if state["shuffle"] != self._shuffle:
            problems.append(f"data.shuffle={self._shuffle}: the checkpoint was made with {state['shuffle']}; use that")
        raise_all(problems, "resume")
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])
        self._order = self._epoch_order()

    def _next(self) -> tuple[int, Row]:
        if self._offset == len(self._rows):
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._epoch_order()
        prompt_id = self._epoch * len(self._rows) + self._offset
        row = self._rows[self._order[self._offset]]
        self._offset += 1
        return prompt_id, row

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self._rows)))
        if self._shuffle:
            random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows in order. Folders of the videos are left out: a dataset may move between two runs."""
    digest = hashlib.sha256()
    for row in rows:
        names = [PurePath(video).name for video in row.videos]
        digest.update(json.dumps([row.problem, row.answer, row.problem_type, names]).encode())
    return digest.hexdigest()
