# SPDX-License-Identifier: Apache-2.0
"""Rows of integers and of times as few bytes: prompts of 250,000 tokens are sent and stored in a few KB."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_TICKS_PER_SECOND = 1_000_000  # the finest clock that timestamps are tried on
NUM_TIMES_FOR_TICKS = 16  # the last timestamps, from which the clock is found


def integers_to_bytes(values: Sequence[int] | NDArray[np.int64]) -> bytes:
    """int64 [n] as the differences of neighbours, their lowest bytes first, compressed."""
    steps = np.diff(np.asarray(values, np.int64), prepend=0)
    return zlib.compress(steps.view(np.uint8).reshape(-1, 8).T.tobytes())


def integers_from_bytes(data: bytes) -> tuple[int, ...]:
    """The inverse of `integers_to_bytes`."""
    steps = np.frombuffer(zlib.decompress(data), np.uint8).reshape(8, -1).T.copy().view(np.int64)
    return tuple(steps.ravel().cumsum().tolist())


def times_to_bytes(times: Sequence[float]) -> tuple[int, bytes, bytes]:
    """Seconds as (ticks a second, the nearest tick of each time, by how much its bits differ from those of the
    time)."""
    found = {
        Fraction(time).limit_denominator(MAX_TICKS_PER_SECOND).denominator for time in times[-NUM_TIMES_FOR_TICKS:]
    }
    rate = math.lcm(*found)
    rate = rate if rate <= MAX_TICKS_PER_SECOND else MAX_TICKS_PER_SECOND
    exact = np.array(times, np.float64)
    with np.errstate(invalid="ignore"):  # past int64 any tick will do: the difference makes up for it
        ticks = (exact * rate).round().astype(np.int64)
    difference = exact.view(np.int64) - (ticks / rate).view(np.int64)
    return rate, integers_to_bytes(ticks), integers_to_bytes(difference)


def times_from_bytes(rate: int, ticks: bytes, difference: bytes) -> tuple[float, ...]:
    """The inverse of `times_to_bytes`, bit for bit."""
    nearest = np.array(integers_from_bytes(ticks), np.int64) / rate
    bits = nearest.view(np.int64) + np.array(integers_from_bytes(difference), np.int64)
    return tuple(bits.view(np.float64).tolist())
