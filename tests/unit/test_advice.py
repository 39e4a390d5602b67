# SPDX-License-Identifier: Apache-2.0
"""Truncation, steps without variance and spikes are told once, with what to do; usual numbers are not remarked on."""

from __future__ import annotations

import math

import pytest

from megatron_rl.observe.advice import StepAdvice

GOOD = {"response_length/clip_ratio": 0.1, "rollout/zero_variance_groups": 0.5, "actor/grad_norm": 1.0}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"response_length/clip_ratio": 0.88}, "88% of the responses were cut at rollout.max_response_tokens"),
        ({"rollout/zero_variance_groups": 1.0, "critic/score/mean": 0.0}, "in no group do the rewards differ (mean 0."),
        ({"actor/grad_norm": 10.5}, "the gradient norm (actor/grad_norm) is 10.5, more than 10 times its usual 1;"),
        ({"actor/grad_norm": math.nan}, "the gradient norm (actor/grad_norm) is nan"),
    ],
)
def test_each_is_told_once(metrics: dict[str, float], words: str) -> None:
    advice = StepAdvice()
    assert [advice.look(GOOD) for _ in range(5)] == [[]] * 5
    [line] = advice.look(GOOD | metrics)
    assert words in line and "; " in line
    assert advice.look(GOOD | metrics) == advice.look(GOOD) == []


def test_the_loss_of_a_diverging_run_is_a_spike() -> None:
    advice = StepAdvice()
    losses = [6.6, 447.0, 599.0, 513.0]
    said = [advice.look({"sft/nll": loss}) for loss in losses]
    assert said == [
        [],
        ["the loss (sft/nll) is 447, more than 10 times its usual 6.6; if it stays, lower train.optimizer.lr"],
        [],
        [],
    ]


def test_a_loss_that_is_never_finite_is_told() -> None:
    advice = StepAdvice()
    assert [len(advice.look({"sft/nll": math.inf})) for _ in range(3)] == [1, 0, 0]


def test_the_first_steps_are_not_compared() -> None:
    advice = StepAdvice()
    assert not any(advice.look({"actor/grad_norm": norm}) for norm in (0.0, 0.0, 0.01, 50.0, 0.5, 60.0))
