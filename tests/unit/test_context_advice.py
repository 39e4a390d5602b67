# SPDX-License-Identifier: Apache-2.0
"""When a smaller context parallel size is advised, and with which figures."""

from __future__ import annotations

import pytest

from megatron_rl.training.context_advice import FLOPS_PER_BYTE, SmallerContext, advise, predict, warn_once
from megatron_rl.training.packing import Bundle, bundle_cost
from model_providers.qwen3.tiny import tiny
from model_providers.qwen3.weights import shape_of

SHAPE = shape_of({"model_type": "qwen2", **tiny(272)})


def _bundles(*lengths: int) -> list[Bundle]:
    return [Bundle((i,), n, bundle_cost(0, [n], SHAPE.hidden_size)) for i, n in enumerate(lengths)]


def test_prediction_by_hand() -> None:
    """Two sequences on two data parallel ranks of two context parallel ranks each."""
    found = predict(_bundles(100, 60), SHAPE, context=2, num_data=2, max_tokens=200)
    assert found.work == pytest.approx(bundle_cost(0, [100], 128) / 2 * 24 * 128**2 * 3)
    assert found.communication == pytest.approx(100 / 2 * (2 * 2 * 2 * 32) * 4 * FLOPS_PER_BYTE)


def test_short_sequences_do_not_need_the_ranks() -> None:
    text = advise(_bundles(*[100] * 16), SHAPE, context=4, num_data=1, max_tokens=1600)
    assert text is not None and "parallel.context=4: the longest of this batch has 100 tokens" in text
    assert "parallel.context=1 with train.max_tokens_per_microbatch=400" in text


def test_a_long_sequence_needs_them() -> None:
    assert advise(_bundles(1500, *[50] * 4), SHAPE, context=4, num_data=1, max_tokens=2000) is None


def test_idle_ranks_are_no_gain() -> None:
    """One sequence: with fewer ranks to it the others would have nothing to do, and a large model is all work."""
    wide = shape_of({"model_type": "qwen2", **tiny(272), "hidden_size": 8192})
    [bundle] = _bundles(400)
    assert advise([Bundle(bundle.members, 400, 400.0)], wide, context=4, num_data=1, max_tokens=1600) is None


def test_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.training.context_advice._SAID", set())
    with pytest.warns(SmallerContext) as caught:
        for count in (16, 15):
            warn_once(_bundles(*[100] * count), SHAPE, 4, 1, 1600)
    assert len(caught) == 1


def test_nothing_to_advise_without_context_parallelism() -> None:
    assert advise(_bundles(100), SHAPE, context=1, num_data=4, max_tokens=400) is None
    assert advise([], SHAPE, context=2, num_data=4, max_tokens=400) is None
