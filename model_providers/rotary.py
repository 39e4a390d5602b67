# SPDX-License-Identifier: Apache-2.0
"""Rotary angles from this rank's own position ids, for every family.

Megatron-core's own modules read whole sequences that start at 0, or know only sections one behind the other and no
scaling; and they divide their result for context parallelism in an order that is not ours.

Shapes (types.py): D the rotated columns of a head, D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model_providers.shape import LinearScaling, Llama3Scaling, RopeSettings, YarnScaling


class Rotary(torch.nn.Module):
    """Position ids int64 [3, 1, T] (time, height, width) -> angles fp32 [T, 1, 1, D], the second half as the first."""

    inv_freq: Tensor
    rows: Tensor

    def __init__(self, rope: RopeSettings):
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(rope), persistent=False)
        self.register_buffer("rows", rows_of_frequencies(rope), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        positions = position_ids.to(self.inv_freq.device)[:, 0]
        angles = positions[self.rows].T.float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None]


def rows_of_frequencies(rope: RopeSettings) -> Tensor:
    """int64 [D / 2]: which row of the position ids each frequency reads.

    Interleaved sections (a, b, c): time, height, width, time, height, width ...; height for the first b turns, width
    for the first c, and time everywhere else.
    """
    rows = torch.zeros(rope.dim // 2, dtype=torch.int64)
    if rope.sections is None:
        return rows
    assert sum(rope.sections) == len(rows), "the sections must cover all frequencies"
    if not rope.interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(rope.sections))
    for row in (1, 2):
        rows[row : 3 * rope.sections[row] : 3] = row
    return rows


def inverse_frequencies(rope: RopeSettings) -> Tensor:
    """fp32 [D / 2]: radians by which one position turns each frequency. Operation by operation as in transformers, so
    that no bit differs."""
    periods = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.scaling:
        case LinearScaling(factor):
            return 1.0 / periods / factor
        case Llama3Scaling():
            return _llama3(1.0 / periods, rope.scaling)
        case YarnScaling():
            return _yarn(periods, rope, rope.scaling)
        case None:
            return 1.0 / periods


def _llama3(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_positions / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - kept) * inv_freq / scaling.factor + kept * inv_freq
    is_long = wavelength > scaling.original_positions / scaling.low_freq_factor
    is_short = wavelength < scaling.original_positions / scaling.high_freq_factor
    return torch.where(is_long, inv_freq / scaling.factor, torch.where(is_short, inv_freq, between))


def _yarn(periods: Tensor, rope: RopeSettings, scaling: YarnScaling) -> Tensor:
    def index_of(num_turns: float) -> float:
        """The frequency that turns so often within the context of pretraining."""
        ratio = scaling.original_positions / (num_turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0
    kept = 1 - ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def set_attention_factor(config: TransformerConfig, rope: RopeSettings) -> None:
    """Tell Megatron-core by what YaRN multiplies cosines and sines.

    Its attention reads this from three attributes for which `TransformerConfig` has no fields, and knows only factors
    of the form (0.1 m ln s + 1) / (0.1 n ln s + 1). With s = e, m = 10 (factor - 1) and n = 0 it is any factor.
    """
    if isinstance(rope.scaling, YarnScaling):
        mscale = 10 * (rope.scaling.attention_factor - 1)
        vars(config).update(yarn_rotary_scaling_factor=math.e, yarn_mscale=mscale, yarn_mscale_all_dim=0.0)
