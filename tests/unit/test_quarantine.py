# SPDX-License-Identifier: Apache-2.0
"""Rows set aside: counted by kind, listed, and too many of them stop the run."""

from __future__ import annotations

import json

import pytest

from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.types import BadRow

ROW, FILE, LONG = (BadRow(f"a.jsonl:{n}", why, why) for n, why in enumerate(("row", "media", "overlong"), start=1))


def test_counted_by_kind_and_listed(tmp_path):
    quarantine = Quarantine(tmp_path / "run", writes=True, max_fraction=0.5)
    quarantine.add([ROW, FILE, LONG], 10, "step 0")
    quarantine.add([], 10, "step 1")
    quarantine.add([FILE], 10, "step 2")
    assert quarantine.metrics() == {
        "data/quarantined": 4.0, "data/bad_rows": 1.0, "data/bad_media": 2.0, "data/overlong": 1.0,
    }  # fmt: skip
    listed = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert [row["source"] for row in listed] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:2"]
    assert listed[1] == {"source": "a.jsonl:2", "reason": "media", "kind": "media"}


def test_only_one_rank_writes(tmp_path):
    Quarantine(tmp_path, writes=False, max_fraction=1.0).add([ROW], 2, "step 0")
    assert list(tmp_path.iterdir()) == []


def test_too_many_faulty_rows_stop_the_run_and_long_ones_do_not(tmp_path):
    quarantine = Quarantine(tmp_path, writes=True, max_fraction=0.2)
    quarantine.add([ROW, FILE], 10, "step 0")
    quarantine.add([LONG] * 9, 10, "step 1")
    with pytest.raises(ValueError, match=r"(?s)^data\.max_bad_fraction=0\.2: 3 of 10 rows of step 2 .*a\.jsonl:1: row"):
        quarantine.add([ROW, FILE, FILE], 10, "step 2")
    assert quarantine.total == 14


def test_a_batch_of_which_nothing_is_left_stops_the_run(tmp_path):
    quarantine = Quarantine(tmp_path, writes=True, max_fraction=1.0)
    with pytest.raises(
        ValueError, match=r"^data\.max_prompt_tokens: none of the 3 rows of step 0 is left, 2 are too long"
    ):
        quarantine.add([LONG, ROW, LONG], 3, "step 0")
    with pytest.raises(
        ValueError, match=r"^train\.max_answer_tokens: none of the 1 rows of a batch is left, 1 are too"
    ):
        quarantine.add([LONG], 1, "a batch", "train.max_answer_tokens")
    with pytest.raises(
        ValueError, match=r"^data\.max_bad_fraction: none of the 2 rows of step 1 is left, none can be used"
    ):
        quarantine.add([FILE, ROW], 2, "step 1")
