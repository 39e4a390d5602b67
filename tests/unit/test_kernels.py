# SPDX-License-Identifier: Apache-2.0
"""The attention primitive: its mask convention, its gradient from a part of the keys, and the GPU kernels' shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_providers.attention.blockwise import merge_
from model_providers.attention.kernels import KERNELS, AtenCpu, AtenCuda
from tests.attention_masks import masked_attention

KERNEL = AtenCpu()


def _qkv(num_q: int, num_k: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_q * 1000 + num_k)
    shapes = [(num_q, heads, 32), (num_k, kv_heads, 32), (num_k, kv_heads, 32)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def test_whole_and_causal_blocks_of_different_lengths() -> None:
    lengths = (5, 3, 3, 7)
    q, k, v = _qkv(18, 18)
    out, lse = KERNEL.forward(q, k, v, lengths, lengths, causal=True)
    row = 0
    for n in lengths:
        window = slice(row, row + n)
        expected = masked_attention(q[window], k[window], v[window], torch.ones(n, n).tril().bool())
        torch.testing.assert_close(out[window], expected, rtol=0, atol=1e-12)
        row += n
    assert lse.shape == (18, 4) and lse.dtype == torch.float64
    out, _ = KERNEL.forward(q, k[:10], v[:10], (10, 8), (6, 4), causal=False)
    expected = masked_attention(q[10:], k[6:10], v[6:10], torch.ones(8, 4).bool())
    torch.testing.assert_close(out[10:], expected, rtol=0, atol=1e-12)


def test_lse_is_the_logarithm_of_the_sum_of_exponentials() -> None:
    q, k, v = _qkv(6, 9)
    _, lse = KERNEL.forward(q, k, v, (6,), (9,), causal=False)
    scores = torch.einsum("tad,sad->tas", q, k.repeat_interleave(2, dim=1)) / 32**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)


def test_parts_merge_into_the_whole_and_share_its_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(6, 20))
    grad = torch.randn(6, 4, 32, dtype=torch.float64)
    whole = masked_attention(q, k, v, torch.ones(6, 20).bool())
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    with torch.no_grad():
        out, lse = KERNEL.forward(q, k[:13], v[:13], (6,), (13,), causal=False)
        merge_(out, lse, *KERNEL.forward(q, k[13:], v[13:], (6,), (7,), causal=False))
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
        first = KERNEL.backward(grad, q, k[:13], v[:13], out, lse, (6,), (13,), causal=False)
        second = KERNEL.backward(grad, q, k[13:], v[13:], out, lse, (6,), (7,), causal=False)
    torch.testing.assert_close(first[0] + second[0], expected[0], rtol=0, atol=1e-12)
    for both, one, other in zip(expected[1:], first[1:], second[1:], strict=True):
        torch.testing.assert_close(torch.cat([one, other]), both, rtol=0, atol=1e-12)


def test_causal_means_upper_left_to_aten_on_a_cpu() -> None:
    """Why causal blocks must be square here: flash-attn would align the same call to the lower right."""
    q, k, v = _qkv(2, 5)
    out, _ = KERNEL.forward(q, k, v, (2,), (5,), causal=True)
    upper_left = masked_attention(q, k, v, torch.ones(2, 5).tril().bool())
    lower_right = masked_attention(q, k, v, torch.ones(2, 5).tril(3).bool())
    torch.testing.assert_close(out, upper_left, rtol=0, atol=1e-12)
    assert float((out - lower_right).abs().max()) > 0.1


def test_bfloat16_keeps_its_sums_in_fp32() -> None:
    q, k, v = _qkv(40, 40, dtype=torch.bfloat16)
    out, lse = KERNEL.forward(q, k, v, (40,), (40,), causal=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = masked_attention(*(t.double() for t in (q, k, v)), torch.ones(40, 40).tril().bool())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)


def test_the_cuda_kernel_of_aten_takes_and_returns_these_shapes() -> None:
    """On the meta device: signatures and shapes of the real operators, without a GPU. Values are for tests/gpu."""
    q, k, v = (t.to("meta", torch.bfloat16) for t in _qkv(12, 12))
    out, lse = AtenCuda().forward(q, k, v, (6, 6), (6, 6), causal=True)
    assert out.shape == q.shape and lse.shape == (12, 4) and lse.dtype == torch.float32
    grads = AtenCuda().backward(out, q, k, v, out, lse, (6, 6), (6, 6), causal=True)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_stateless(name: str) -> None:
    assert vars(KERNELS[name]()) == {}
