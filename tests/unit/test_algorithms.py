# SPDX-License-Identifier: Apache-2.0
"""Advantages, group filter, KL estimators and losses against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
import torch

from megatron_rl.algorithms.advantages import ADVANTAGES, dr_grpo, grpo, rloo
from megatron_rl.algorithms.correction import CORRECTIONS, CorrectedLoss, TruncatedImportanceSampling
from megatron_rl.algorithms.groups import keep_informative
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.losses import LOSSES, NllLoss, PpoClip
from megatron_rl.config.schema import AlgorithmConfig
from megatron_rl.types import AdvantageInputs, Completion, Corrected, Group, LossInputs, Prompt, Row, Scored

# ---------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # rewards 0, 1, 1, 2: mean 1, sum of squares 2, std = sqrt(2 / 3)
    rewards = [0.0, 1.0, 1.0, 2.0]
    std = math.sqrt(2 / 3)
    assert dr_grpo(rewards) == [-1, 0, 0, 1]
    assert grpo(rewards) == pytest.approx([-1 / (std + 1e-6), 0, 0, 1 / (std + 1e-6)], rel=1e-12)
    assert rloo(rewards) == pytest.approx([0 - 4 / 3, 1 - 3 / 3, 1 - 3 / 3, 2 - 2 / 3])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_teach_exactly_nothing(name):
    made = ADVANTAGES[name](AdvantageInputs(((0.1, 0.1, 0.1),), ((1, 2, 3),)))
    assert [values.tolist() for values in made.tokens[0]] == [[0.0], [0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("name", "of_group"), [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo)])
def test_every_token_of_a_response_has_its_advantage(name, of_group):
    rewards, lengths = ((0.0, 1.0, 1.0, 2.0), (3.0, 5.0)), ((2, 1, 0, 3), (1, 2))
    made = ADVANTAGES[name](AdvantageInputs(rewards, lengths))
    for group, values, counts in zip(made.tokens, map(of_group, rewards), lengths, strict=True):
        for tokens, value, count in zip(group, values, counts, strict=True):
            assert tokens.dtype == torch.float32
            assert tokens.tolist() == pytest.approx([value] * count, rel=1e-6)


def test_grpo_does_not_depend_on_the_scale_of_the_reward():
    small, large = grpo([0, 0.1, 0.9]), grpo([0, 10, 90])
    assert small == pytest.approx(large, rel=1e-4)


def test_names_are_those_of_the_configuration():
    hints = typing.get_type_hints(AlgorithmConfig)
    assert set(ADVANTAGES) == set(typing.get_args(hints["advantage"]))
    assert set(LOSSES) == set(typing.get_args(hints["loss"]))
    assert {"none", *CORRECTIONS} == set(typing.get_args(hints["correction"]))


# -------------------------------------------------------------------------------------------------------------- groups


def group(*rewards: float) -> Group:
    prompt = Prompt(0, Row("rows.jsonl:1", "question", "answer"), (), ())
    return Group(prompt, tuple(Scored(Completion(0, i, (), (), "", False), r, {}) for i, r in enumerate(rewards)))


def test_groups_are_kept_by_their_mean_bounds_excluded():
    groups = [group(0, 0), group(0, 1), group(1, 1), group(0.25, 0.25), group(0.75, 0.75), group(0, 0.6)]
    kept, dropped = keep_informative(groups, 0.25, 0.75)
    assert kept == [groups[1], groups[5]]
    assert dropped == [groups[0], groups[2], groups[3], groups[4]]


# ------------------------------------------------------------------------------------------------------------------ kl


def test_kl_by_hand():
    p, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])  # d = -1, 0.5
    assert kl(p, ref, "k1").tolist() == [1.0, -0.5]
    assert kl(p, ref, "abs").tolist() == [1.0, 0.5]
    assert kl(p, ref, "k2").tolist() == [0.5, 0.125]
    assert kl(p, ref, "k3").tolist() == pytest.approx([math.exp(-1) + 1 - 1, math.exp(0.5) - 0.5 - 1], rel=1e-6)


def test_k3_stays_finite_and_bounded():
    p, ref = torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0])  # d = 500 and -500
    assert kl(p, ref, "k3").tolist() == [10.0, 10.0]


def test_k3_of_bf16_inputs_is_fp32_and_never_negative():
    p = torch.linspace(-3, 0, 64).bfloat16()
    value = kl(p, p + 0.01, "k3")
    assert value.dtype == torch.float32
    assert (value >= 0).all()


@pytest.mark.parametrize(("kind", "slope"), [("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))])
def test_kl_gradients(kind, slope):
    p = torch.tensor([-1.0], requires_grad=True)
    kl(p, torch.tensor([-1.5]), kind).sum().backward()
    assert p.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_are_unbiased(kind):
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    expected = (p * kl(p.log(), q.log(), kind)).sum()
    assert expected.item() == pytest.approx(exact.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- losses


def inputs(ratios, advantages, weights=None, **other) -> LossInputs:
    old = torch.full((len(ratios),), -1.0)
    return LossInputs(
        logprobs=(old + torch.tensor(ratios).log()).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=other.get("ref"),
        rollout_logprobs=other.get("rollout", old),
        advantages=torch.tensor(advantages),
        weights=torch.ones(len(ratios)) if weights is None else torch.tensor(weights),
    )


def mean(output, name: str) -> float:
    numerator, denominator = output.metrics[name]
    return (numerator / denominator).item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "higher", "lower", "slope"),
    [
        (1.0, 2.0, -2.0, 0, 0, -2.0),
        (1.5, 1.0, -1.3, 1, 0, 0.0),  # clipped at 1 + 0.3
        (0.5, 1.0, -0.5, 0, 0, -0.5),
        (0.5, -1.0, 0.8, 1, 0, 0.0),  # clipped at 1 - 0.2
        (2.0, -1.0, 2.0, 0, 0, 2.0),
        (5.0, -1.0, 3.0, 0, 1, 0.0),  # dual clip
        (5.0, 0.0, 0.0, 0, 0, 0.0),
    ],
)
def test_ppo_clip_token_by_token(ratio, advantage, loss, higher, lower, slope):
    given = inputs([ratio], [advantage])
    output = PpoClip(clip_low=0.2, clip_high=0.3, clip_dual=3.0)(given)
    assert output.loss_sum.item() == pytest.approx(loss, abs=1e-6)
    assert mean(output, "actor/pg_loss") == pytest.approx(loss, abs=1e-6)
    assert mean(output, "actor/pg_clipfrac_higher") == higher
    assert mean(output, "actor/pg_clipfrac_lower") == lower
    output.loss_sum.backward()
    assert given.logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


def test_sums_are_weighted_and_metrics_count_active_tokens():
    given = inputs([1.0, 1.5, 0.5, 2.0], [1.0, 1.0, 1.0, 9.0], weights=[1.0, 2.0, 0.5, 0.0])
    output = PpoClip()(given)
    assert output.loss_sum.item() == pytest.approx(1 * -1.0 + 2 * -1.3 + 0.5 * -0.5)
    assert all(denominator.item() == 3 for _, denominator in output.metrics.values())
    assert mean(output, "actor/pg_loss") == pytest.approx((-1.0 - 1.3 - 0.5) / 3)
    assert mean(output, "actor/pg_clipfrac_higher") == pytest.approx(1 / 3)
    assert mean(output, "actor/ppo_kl") == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 3)
    assert mean(output, "actor/entropy_loss") == pytest.approx(-(-3 + math.log(1.5) + math.log(0.5)) / 3)
    output.loss_sum.backward()
    assert given.logprobs.grad[3].item() == 0


def test_the_first_update_is_the_plain_policy_gradient():
    given = inputs([1.0, 1.0], [0.5, -2.0])
    output = PpoClip()(given)
    output.loss_sum.backward()
    assert given.logprobs.grad.tolist() == [-0.5, 2.0]
    for name in ("actor/ppo_kl", "actor/pg_clipfrac_higher", "actor/pg_clipfrac_lower"):
        assert mean(output, name) == 0


def test_a_kl_term_is_added_with_its_weight():
    ref = torch.tensor([-1.5, -1.0])  # k2: 0.125 and 0
    given = inputs([1.0, 1.0], [1.0, 1.0], weights=[2.0, 1.0], ref=ref)
    output = PpoClip(kl_coef=0.5, kl_kind="k2")(given)
    assert output.loss_sum.item() == pytest.approx(-3 + 0.5 * 2 * 0.125)
    assert mean(output, "actor/kl_loss") == pytest.approx(0.0625)
    assert mean(output, "actor/pg_loss") == pytest.approx(-1)
    with pytest.raises(AssertionError):
        PpoClip(kl_coef=0.5)(inputs([1.0], [1.0]))


def test_the_gap_to_the_rollout_engine():
    given = inputs([1.0, 1.0], [1.0, 1.0], rollout=torch.tensor([-1.1, -0.8]))
    output = PpoClip()(given)
    assert mean(output, "rollout/logprob_gap_mean") == pytest.approx(0.15, rel=1e-5)
    expected = (math.exp(0.1) + math.exp(0.2)) / 2
    assert mean(output, "rollout/token_mult_prob_error") == pytest.approx(expected, rel=1e-5)
    assert "actor/kl_loss" not in output.metrics


def test_a_hopeless_ratio_gives_finite_numbers():
    given = dataclasses.replace(inputs([1.0], [1.0]), old_logprobs=torch.tensor([-300.0]))
    output = PpoClip()(given)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(-1.3)
    assert given.logprobs.grad.item() == 0


def test_metrics_add_up_over_microbatches():
    whole = inputs([1.0, 1.5, 0.5, 2.0], [1.0, -1.0, 1.0, -9.0])
    halves = [
        LossInputs(*(None if v is None else v[part] for v in _fields(whole))) for part in (slice(0, 1), slice(1, 4))
    ]
    outputs = [PpoClip()(half) for half in halves]
    together = PpoClip()(whole)
    assert sum(o.loss_sum.item() for o in outputs) == pytest.approx(together.loss_sum.item())
    for name, (numerator, denominator) in together.metrics.items():
        assert sum(o.metrics[name][0].item() for o in outputs) == pytest.approx(numerator.item(), abs=1e-6)
        assert sum(o.metrics[name][1].item() for o in outputs) == denominator.item()
        assert not numerator.requires_grad


def _fields(given: LossInputs):
    return [getattr(given, field.name) for field in dataclasses.fields(given)]


def test_nll():
    given = inputs([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], weights=[1.0, 0.5, 0.0])
    output = NllLoss()(given)
    assert output.loss_sum.item() == pytest.approx(1.5)
    assert set(output.metrics) == {"sft/nll"}
    assert mean(output, "sft/nll") == pytest.approx(1.0)
    output.loss_sum.backward()
    assert given.logprobs.grad.tolist() == [-1.0, -0.5, 0.0]


# ---------------------------------------------------------------------------------------------------------- correction


def test_truncated_importance_sampling_by_hand():
    old, rollout = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])  # ratios 1, e^1.5, e^-1
    corrected = TruncatedImportanceSampling(cap=2.0)(old, rollout)
    assert corrected.weight.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)], rel=1e-6)
    assert corrected.keep.tolist() == [True, True, True]


def test_a_corrected_loss_weighs_each_token():
    given = inputs([1.0, 1.0], [1.0, 1.0], weights=[1.0, 0.5], rollout=torch.tensor([-1.5, -0.5]))
    output = CorrectedLoss(PpoClip(), TruncatedImportanceSampling(cap=10.0))(given)  # ratios e^0.5, e^-0.5
    assert output.loss_sum.item() == pytest.approx(-math.exp(0.5) - 0.5 * math.exp(-0.5))
    assert mean(output, "correction/weight_mean") == pytest.approx((math.exp(0.5) + math.exp(-0.5)) / 2)
    assert mean(output, "actor/pg_loss") == pytest.approx(-1.0)  # metrics of the loss stay per token


def test_a_token_that_is_not_kept_teaches_nothing():
    def first_only(old, rollout):
        return Corrected(torch.ones_like(old), torch.arange(len(old)) == 0)

    given = inputs([1.0, 1.0], [1.0, 1.0])
    output = CorrectedLoss(PpoClip(), first_only)(given)
    output.loss_sum.backward()
    assert given.logprobs.grad.tolist() == [-1.0, 0.0]
    assert mean(output, "correction/kept_fraction") == 0.5


def test_without_a_mismatch_a_correction_changes_nothing():
    given = inputs([1.0, 1.3], [0.5, -2.0])
    plain, corrected = PpoClip()(given), CorrectedLoss(PpoClip(), TruncatedImportanceSampling())(given)
    assert torch.equal(plain.loss_sum, corrected.loss_sum)
