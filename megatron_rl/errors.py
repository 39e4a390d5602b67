# SPDX-License-Identifier: Apache-2.0
"""The few errors a caller branches on. Everything else is a ValueError for the user or an assert for us."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

EXIT_USAGE = 2  # status of a process that a user's mistake ended, and that has said which


class BadSample(Exception):
    """One sample cannot be used (missing video, malformed row ...). The loop quarantines it and goes on."""

    def __init__(self, source: str, reason: str, kind: Literal["row", "media", "overlong"] = "row"):
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason
        self.kind = kind


class VideoDecodeError(BadSample):
    """A video file is missing, empty, truncated, corrupt or has no video stream."""

    def __init__(self, source: str, reason: str):
        super().__init__(source, reason, "media")


class WeightMismatch(ValueError):
    """Weights on two sides do not fit. Lists every difference, not the first."""


class PeerLost(RuntimeError):
    """Another rank died or stopped answering; the message names it and the phase it was in."""


def raise_all(problems: Iterable[str], title: str) -> None:
    """Raise one ValueError that lists every problem; do nothing when there is none."""
    found = list(problems)
    if found:
        noun = "problem" if len(found) == 1 else "problems"
        raise ValueError("\n".join([f"{title}: {len(found)} {noun}", *(f"  {p}" for p in found)]))
