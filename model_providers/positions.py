# SPDX-License-Identifier: Apache-2.0
"""Positions of families in which all tokens, of media or not, count up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.types import MediaItem, Run


def text_positions(num_tokens: int, media: Sequence[MediaItem], spans: Sequence[Sequence[Run]]) -> Tensor:
    """int64 [3, num_tokens]: three equal rows, counting up (protocol PositionRule)."""
    return torch.arange(num_tokens).expand(3, -1)
