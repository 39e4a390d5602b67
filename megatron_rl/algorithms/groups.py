# SPDX-License-Identifier: Apache-2.0
"""Which groups of responses are worth training on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.types import Group


def keep_informative(groups: Sequence[Group], low: float, high: float) -> tuple[list[Group], list[Group]]:
    """(kept, dropped) in order: a group is kept when low < its mean reward < high.

    DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476): a prompt solved always or never gives no gradient.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    for group in groups:
        mean = statistics.fmean(scored.reward for scored in group.scored)
        (kept if low < mean < high else dropped).append(group)
    return kept, dropped
