# SPDX-License-Identifier: Apache-2.0
"""The order of rows: complete, unique ids, the same on every rank and after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain

import pytest

from data.rows.loader import RowLoader
from megatron_rl.types import Row

ROWS = [Row(f"t.jsonl:{n}", f"problem {n}", str(n), (f"/media/{n}.mp4",)) for n in range(10)]


def loader(rows=ROWS, batch_size=4, seed=3, shuffle=True) -> RowLoader:
    return RowLoader([rows], batch_size, seed, shuffle)


def take(source: RowLoader, num_batches: int) -> list[tuple[int, Row]]:
    return list(chain.from_iterable(source.next_batch() for _ in range(num_batches)))


def test_without_shuffling_rows_come_in_file_order_over_epochs():
    dealt = take(loader(shuffle=False), 5)
    assert dealt == list(enumerate(ROWS * 2))


def test_every_epoch_is_a_new_permutation_and_batches_cross_its_end():
    dealt = [row for _, row in take(loader(), 5)]
    first, second = dealt[:10], dealt[10:]
    assert sorted(map(ROWS.index, first)) == sorted(map(ROWS.index, second)) == list(range(10))
    assert first != second and first != ROWS


def test_prompt_ids_count_the_rows_dealt():
    assert [number for number, _ in take(loader(), 9)] == list(range(36))


def test_two_ranks_agree_and_another_seed_differs():
    assert take(loader(), 5) == take(loader(), 5)
    assert take(loader(), 2) != take(loader(seed=4), 2)


def test_a_batch_may_be_larger_than_the_dataset():
    assert [row for _, row in loader(ROWS[:3], batch_size=7, shuffle=False).next_batch()] == (ROWS[:3] * 3)[:7]


@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 5, 8])
def test_resume_goes_on_where_it_stopped(num_before):
    whole = take(loader(), num_before + 4)
    stopped = loader()
    take(stopped, num_before)
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert take(resumed, 4) == whole[num_before * 4 :]


def test_another_order_of_rows_is_refused_with_all_reasons():
    state = loader().state_dict()
    with pytest.raises(ValueError, match="another dataset .10 rows, now 9.") as refused:
        loader(ROWS[1:], seed=5, shuffle=False).load_state_dict(state)
    assert "seed=5" in str(refused.value) and "data.shuffle=False" in str(refused.value)
    with pytest.raises(ValueError, match="another dataset"):
        loader([replace(ROWS[0], answer="changed"), *ROWS[1:]]).load_state_dict(state)


def test_a_moved_dataset_is_the_same_dataset():
    moved = [replace(row, videos=(row.videos[0].replace("/media", "/other"),)) for row in ROWS]
    resumed = loader(moved)
    resumed.load_state_dict(loader().state_dict())
    assert [number for number, _ in resumed.next_batch()] == [0, 1, 2, 3]


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="data.train"):
        loader([])


# ---------------------------------------------------------------------------------------------- several data sets

SMALL = [Row(f"s.jsonl:{n}", f"small {n}", str(n)) for n in range(3)]
SETS = (ROWS, SMALL)


def mixed(weights, batch_size=5, sets=SETS) -> RowLoader:
    return RowLoader(sets, batch_size, 3, True, weights)


def test_without_weights_several_data_sets_are_one():
    dealt = [row for _, row in take(mixed((), batch_size=13), 1)]
    assert sorted(row.source for row in dealt) == sorted(row.source for row in (*ROWS, *SMALL))


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 0.8), (1, 2.5)])
def test_every_stretch_of_the_stream_has_its_share_of_each(weights):
    dealt = [row for _, row in take(mixed(weights), 60)]
    share = weights[1] / sum(weights)
    for stop in range(1, len(dealt) + 1):
        assert abs(sum(row in SMALL for row in dealt[:stop]) - share * stop) <= 1


def test_each_data_set_has_epochs_of_its_own():
    dealt = [row for _, row in take(mixed((1, 1)), 24)]
    small = [row.source for row in dealt if row in SMALL]
    for start in range(0, 60, 3):
        assert sorted(small[start : start + 3]) == ["s.jsonl:0", "s.jsonl:1", "s.jsonl:2"]
    assert len({tuple(small[start : start + 3]) for start in range(0, 60, 3)}) > 1
    large = [row.source for row in dealt if row not in SMALL]
    assert len(set(large[:10])) == 10 and large[:10] != large[10:20]


@pytest.mark.parametrize("num_before", [0, 1, 7, 23])
def test_a_mixture_resumes_exactly(num_before):
    whole = take(mixed((0.3, 0.7)), num_before + 10)
    stopped = mixed((0.3, 0.7))
    take(stopped, num_before)
    resumed = mixed((0.3, 0.7))
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert take(resumed, 10) == whole[num_before * 5 :]
    assert [number for number, _ in whole] == list(range(len(whole)))


def test_other_weights_are_refused():
    state = mixed((1, 1)).state_dict()
    with pytest.raises(ValueError, match="data.weights: the checkpoint was made with shares of"):
        mixed((1, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="10 [+] 3 rows, now 10 [+] 2"):
        mixed((1, 1), sets=(ROWS, SMALL[:2])).load_state_dict(state)


@pytest.mark.parametrize(
    ("weights", "why"), [((1,), "lists 2 data sets"), ((1, 0), "not above 0"), ((-1, 2), "above 0")]
)
def test_wrong_weights(weights, why):
    with pytest.raises(ValueError, match=rf"data\.weights=.*{why}"):
        mixed(weights)


def test_an_empty_data_set_in_a_mixture_is_named():
    with pytest.raises(ValueError, match="no usable row of data set 2"):
        mixed((1, 1), sets=(ROWS, []))


def test_a_look_ahead_deals_nothing():
    one, other = mixed((1, 2)), mixed((1, 2))
    for _ in range(8):
        state = one.state_dict()
        ahead = one.peek_batch()
        assert one.state_dict() == state
        assert one.next_batch() == ahead == other.next_batch()
