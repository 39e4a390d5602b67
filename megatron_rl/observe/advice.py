# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a step mean for whoever watches the run, said once each."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping

SPIKE = 10.0
WINDOW = 20
SPIKING = {"actor/grad_norm": ("the gradient norm", 5), "sft/nll": ("the loss", 1)}
"""What it is called, and how many steps tell what is usual: the gradient of few groups varies by itself."""
MOST = 0.5


class StepAdvice:
    """Looks at the metrics of every step; each kind of advice is given once in the life of the object."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._past: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in SPIKING}

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """What there is to say about a step that has not been said."""
        found = dict([*_truncation(metrics), *_variance(metrics), *self._spikes(metrics)])
        new = [text for kind, text in found.items() if kind not in self._given]
        self._given |= found.keys()
        return new

    def _spikes(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        for name, (words, num_steps) in SPIKING.items():
            value, past = metrics.get(name, 0.0), self._past[name]
            usual = statistics.median(past) if len(past) >= num_steps else math.inf
            if not math.isfinite(value) or value > SPIKE * usual:
                against = f", more than {SPIKE:.0f} times its usual {usual:.3g}" if usual < math.inf else ""
                yield name, f"{words} ({name}) is {value:.3g}{against}; if it stays, lower train.optimizer.lr"
            if value > 0:
                past.append(value)


def _truncation(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    part = metrics.get("response_length/clip_ratio", 0.0)
    if part >= MOST:
        yield (
            "truncation",
            (
                f"{part:.0%} of the responses were cut at rollout.max_response_tokens before they ended; raise it, or "
                "reward shorter ones"
            ),
        )


def _variance(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    if metrics.get("rollout/zero_variance_groups") == 1.0:
        score = metrics.get("critic/score/mean", math.nan)
        yield (
            "variance",
            (
                f"in no group do the rewards differ (mean {score:.3f}): nothing is learned from such a step; make the "
                "task easier or harder, or raise rollout.num_samples or rollout.temperature"
            ),
        )
