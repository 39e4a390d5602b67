# SPDX-License-Identifier: Apache-2.0
"""GroupStepAdamW against torch's AdamW, and the format of its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from megatron_rl.training.optimizer import GroupStepAdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def _params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (4,), (2, 2))]


def _set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step - 2)


def _groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.0}]


def _assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_as_torchs_adamw() -> None:
    """Five updates of two groups with their own settings; gradients from 0.01 to 100."""
    ours, theirs = _params(), _params()
    ours_optimizer = GroupStepAdamW(_groups(ours), **SETTINGS)
    theirs_optimizer = torch.optim.AdamW(_groups(theirs), foreach=False, **SETTINGS)
    for step in range(5):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        ours_optimizer.step()
        theirs_optimizer.step()
        _assert_close([p.detach() for p in ours], [p.detach() for p in theirs])
    for p, q in zip(ours, theirs, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours_optimizer.state[p][key], theirs_optimizer.state[q][key])


def test_state_has_the_fused_optimizers_keys_and_the_group_has_the_step() -> None:
    params = _params()
    optimizer = GroupStepAdamW(_groups(params), **SETTINGS)
    for step in range(3):
        _set_gradients(params, step)
        optimizer.step()
    assert [set(optimizer.state[p]) for p in params] == [{"exp_avg", "exp_avg_sq"}] * 3
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]


def test_a_parameter_without_gradient_stays() -> None:
    params = _params()
    before = params[1].detach().clone()
    optimizer = GroupStepAdamW(params, **SETTINGS)
    _set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert optimizer.param_groups[0]["step"] == 1


def test_goes_on_from_its_state_dict() -> None:
    straight, resumed = _params(), _params()
    optimizer = GroupStepAdamW(straight, **SETTINGS)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            with torch.no_grad():
                for p, q in zip(resumed, straight, strict=True):
                    p.copy_(q)
        _set_gradients(straight, step)
        optimizer.step()
    other = GroupStepAdamW(resumed, **SETTINGS)
    other.load_state_dict(state)
    for step in (2, 3):
        _set_gradients(resumed, step)
        other.step()
    assert other.param_groups[0]["step"] == 4
    assert all(torch.equal(p, q) for p, q in zip(resumed, straight, strict=True))


def test_refuses_coupled_weight_decay() -> None:
    with pytest.raises(AssertionError, match="decoupled"):
        GroupStepAdamW(_params(), adam_w_mode=False, **SETTINGS)
