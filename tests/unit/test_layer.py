# SPDX-License-Identifier: Apache-2.0
"""A function of single rows, some rows at a time: the same values and gradients, and next to nothing kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_providers.layer import RecomputedRows, by_rows


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.SiLU(), nn.Linear(20, 6)).double()


def _gradients(network: nn.Module, x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    out.square().sum().backward()
    given = [x, *network.parameters()]
    gradients = [tensor.grad for tensor in given]
    for tensor in given:
        tensor.grad = None
    return gradients


@pytest.mark.parametrize("num_rows", [1, 4, 11, 50])
def test_values_and_gradients_are_those_of_all_rows_at_once(network: nn.Module, num_rows: int) -> None:
    x = torch.randn(11, 1, 6, dtype=torch.float64, requires_grad=True)
    expected = _gradients(network, x, network(x))
    out = RecomputedRows.apply(network, x, num_rows, False)
    torch.testing.assert_close(out, network(x))
    with torch.no_grad():
        torch.testing.assert_close(by_rows(network, x, num_rows), network(x))
    for gradient, other in zip(_gradients(network, x, out), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_rows_are_all_that_is_kept(network: nn.Module) -> None:
    x = torch.randn(11, 1, 6, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: x):
        RecomputedRows.apply(network, x, 4, False)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_without_values_there_are_gradients_and_nothing_to_read(network: nn.Module) -> None:
    x = torch.randn(11, 1, 6, dtype=torch.float64, requires_grad=True)
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    out = RecomputedRows.apply(network, x, 4, True)
    assert out.isnan().all() and not calls
    upstream = torch.randn_like(x)
    torch.autograd.backward(out, upstream)
    gradient, x.grad = x.grad, None
    torch.autograd.backward(network(x), upstream)
    torch.testing.assert_close(gradient, x.grad)
