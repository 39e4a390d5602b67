# SPDX-License-Identifier: Apache-2.0
"""Which groups of responses are worth training on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.types import Scored


def keep_informative(
    groups: Sequence[Sequence[Scored]], low: float, high: float
) -> tuple[list[Sequence[Scored]], list[Sequence[Scored]]]:
    """(kept, dropped) in order: a group is kept when low < its mean reward < high.

    DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476): a prompt solved always or never gives no gradient.
    """
    kept: list[Sequence[Scored]] = []
    dropped: list[Sequence[Scored]] = []
    for group in groups:
        mean = statistics.fmean(scored.reward for scored in group)
        (kept if low < mean < high else dropped).append(group)
    return kept, dropped
