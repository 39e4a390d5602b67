# SPDX-License-Identifier: Apache-2.0
"""When a smaller context parallel size is advised, and with which figures."""

from __future__ import annotations

import pytest

from megatron_rl.training.context_advice import FLOPS_PER_BYTE, advise, predict
from megatron_rl.training.packing import Bundle, bundle_cost
from model_providers.qwen3.tiny import tiny
from model_providers.qwen3.weights import shape_of

SHAPE = shape_of({"model_type": "qwen2", **tiny(272)})


def _bundles(*lengths: int) -> list[Bundle]:
    return [Bundle((i,), 0, (n,), bundle_cost(0, [n], SHAPE.hidden_size)) for i, n in enumerate(lengths)]


ROW_BYTES = 2 * 2 * 2 * 32  # key and value of two heads, bf16


def test_prediction_by_hand() -> None:
    """One sequence over two ranks in zigzag: of its four chunks the first three are needed by the other rank; the one
    that holds the second and third sends both and receives one."""
    found = predict(_bundles(400), SHAPE, 2, "p2p", num_data=1, max_tokens=400)
    assert found.work == pytest.approx(bundle_cost(0, [400], 128) / 2 * 24 * 128**2 * 3)
    assert found.communication == pytest.approx(200 * ROW_BYTES * 4 * FLOPS_PER_BYTE)


def test_heads_travel_however_short_the_sequences() -> None:
    found = predict(_bundles(100, 100), SHAPE, 2, "a2a", num_data=1, max_tokens=400)
    assert found.communication == pytest.approx(200 / 2 / 2 * 2 * (2 * 4 + 2 * 2) * 32 * 2 * FLOPS_PER_BYTE)
    text = advise(_bundles(*[100] * 16), SHAPE, 4, "a2a", num_data=1, max_tokens=1600)
    assert text is not None and "parallel.context=4: the longest of this batch has 100 tokens" in text
    assert "parallel.context=1 with train.max_tokens_per_microbatch=400" in text


def test_short_sequences_that_stay_whole_cost_nothing() -> None:
    assert predict(_bundles(*[100] * 16), SHAPE, 4, "all_gather", 1, 1600).communication == 0
    assert advise(_bundles(*[100] * 16), SHAPE, 4, "all_gather", num_data=1, max_tokens=1600) is None


def test_sequences_that_are_cut_although_they_would_fit() -> None:
    """Two sequences over four ranks are split; two ranks to each would do, and two such pairs."""
    assert advise(_bundles(*[400] * 4), SHAPE, 4, "all_gather", num_data=1, max_tokens=1600) is None  # one a rank
    text = advise(_bundles(*[700] * 4), SHAPE, 4, "all_gather", num_data=1, max_tokens=1400)
    assert text is not None and "parallel.context=2 with train.max_tokens_per_microbatch=700" in text


def test_a_long_sequence_needs_them() -> None:
    assert advise(_bundles(1500, *[50] * 4), SHAPE, 4, "p2p", num_data=1, max_tokens=2000) is None


def test_idle_ranks_are_no_gain() -> None:
    """One sequence: with fewer ranks to it the others would have nothing to do, and a large model is all work."""
    wide = shape_of({"model_type": "qwen2", **tiny(272), "hidden_size": 8192})
    assert advise([Bundle((0,), 0, (400,), 400.0)], wide, 4, "a2a", num_data=1, max_tokens=1600) is None


def test_nothing_to_advise_without_context_parallelism() -> None:
    assert advise(_bundles(100), SHAPE, 1, "p2p", num_data=4, max_tokens=400) is None
    assert advise([], SHAPE, 2, "p2p", num_data=4, max_tokens=400) is None
