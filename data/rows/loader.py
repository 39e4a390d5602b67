# SPDX-License-Identifier: Apache-2.0
"""The endless, resumable order in which rows are used. Pure arithmetic, so every rank has the same one without talking.

One data set is dealt epoch by epoch. Of several, the next row comes from the one that is furthest behind its weight;
each has epochs of its own. Row number `p` of the stream has prompt id `p`: unique over the whole run. Batches run over
the end of an epoch; no row is lost because the batch size does not divide the data set.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from data.video.frame_files import lasting_name
from megatron_rl.errors import raise_all
from megatron_rl.types import Row


class RowLoader:
    """Deals rows in batches, forever. Its whole state is how many rows of each data set have been dealt.

    `datasets` are mixed by `weights` (rows drawn, relative); without weights they are one data set, each row once an
    epoch. Which rank works on a row is decided later, so a run may go on with another number of ranks.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[Row]],
        batch_size: int,
        seed: int,
        shuffle: bool,
        weights: Sequence[float] = (),
    ):
        assert batch_size >= 1
        raise_all(weight_problems(len(datasets), weights), "data")
        if not weights:
            datasets = [[row for rows in datasets for row in rows]]
        for number, rows in enumerate(datasets):
            if not rows:
                which = f" of data set {number + 1}" if weights else ""
                raise ValueError(f"data.train: no usable row{which} in the file; see quarantine.jsonl for the reasons")
        self.batch_size = batch_size
        self._datasets = tuple(tuple(rows) for rows in datasets)
        self._weights = [weight / sum(weights) for weight in weights] if weights else [1.0]
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprints = [fingerprint(rows) for rows in self._datasets]
        self._dealt = [0] * len(self._datasets)
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def next_batch(self) -> list[tuple[int, Row]]:
        """The next `batch_size` rows, each with its prompt id."""
        return [self._next() for _ in range(self.batch_size)]

    def peek_batch(self) -> list[tuple[int, Row]]:
        """What `next_batch` will give, without dealing it."""
        dealt = list(self._dealt)
        batch = self.next_batch()
        self._dealt = dealt
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "dealt": list(self._dealt),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "weights": list(self._weights),
            "num_rows": [len(rows) for rows in self._datasets],
            "fingerprints": list(self._fingerprints),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the row that was dealt last. Refuses a state that belongs to another order of rows."""
        problems = []
        if state["fingerprints"] != self._fingerprints:
            now = [len(rows) for rows in self._datasets]
            problems.append(
                f"data.train: the checkpoint was made with another dataset ({_counts(state['num_rows'])} rows, now "
                f"{_counts(now)}); use the same file, or start a new run_dir"
            )
        if state["weights"] != self._weights:
            problems.append(f"data.weights: the checkpoint was made with shares of {state['weights']}; use those")
        if state["seed"] != self._seed:
            problems.append(f"seed={self._seed}: the checkpoint was made with seed={state['seed']}; use that")
        if state["shuffle"] != self._shuffle:
            problems.append(f"data.shuffle={self._shuffle}: the checkpoint was made with {state['shuffle']}; use that")
        raise_all(problems, "resume")
        self._dealt = list(state["dealt"])

    def _next(self) -> tuple[int, Row]:
        prompt_id = sum(self._dealt)
        behind = [share * (prompt_id + 1) - dealt for share, dealt in zip(self._weights, self._dealt, strict=True)]
        which = behind.index(max(behind))
        rows = self._datasets[which]
        epoch, offset = divmod(self._dealt[which], len(rows))
        self._dealt[which] += 1
        return prompt_id, rows[self._order(which, epoch)[offset]]

    def _order(self, which: int, epoch: int) -> list[int]:
        if self._orders.get(which, (-1, []))[0] != epoch:
            order = list(range(len(self._datasets[which])))
            if self._shuffle:
                name = f"{self._seed}/{epoch}/{which}" if which else f"{self._seed}/{epoch}"
                random.Random(name).shuffle(order)
            self._orders[which] = epoch, order
        return self._orders[which][1]


def weight_problems(num_datasets: int, weights: Sequence[float]) -> list[str]:
    """What is wrong with `data.weights` for so many data sets."""
    if weights and len(weights) != num_datasets:
        return [f"data.weights={list(weights)}: data.train lists {num_datasets} data sets; give one weight for each"]
    if any(not 0 < weight < float("inf") for weight in weights):
        return [f"data.weights={list(weights)}: a weight is not above 0; leave that data set out of data.train"]
    return []


def _counts(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows in order. Folders of the videos are left out: a dataset may move between two runs."""
    digest = hashlib.sha256()
    for row in rows:
        names = [lasting_name(video) for video in row.videos]
        others = [lasting_name(path) for path in (*row.images, *row.audios)]
        # Only where it is there: rows without such things have the sums that they had before there were any.
        rest = [[row.system, row.history, row.video_spans]] if row.system or row.history or row.video_spans else []
        told = [row.problem, row.answer, row.problem_type, names, row.span, *others, *rest]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()
