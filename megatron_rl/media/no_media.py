# SPDX-License-Identifier: Apache-2.0
"""The StepEncoder of a model that takes text only."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.media.routes import WantedTokens
from megatron_rl.types import EncodedMedia, MediaEmbeds, MediaItem


class NoMedia:
    """Refuses every medium by its path; there is nothing to move, so nothing is collective (protocol StepEncoder)."""

    def forget(self) -> None:
        """Nothing is kept."""

    def prefetch(self, media: Sequence[MediaItem]) -> None:
        """Nothing is prefetched. Raises ValueError for any medium."""
        self.encode(media)

    def encode(self, media: Sequence[MediaItem]) -> dict[str, str]:
        """Raises ValueError for any medium."""
        if media:
            raise ValueError(f"{media[0].path}: this model takes no {media[0].kind}; use a model that does")
        return {}

    def fetch(self, media: Sequence[MediaItem]) -> EncodedMedia:
        """Nothing; raises ValueError for any medium."""
        self.encode(media)
        return EncodedMedia({})

    def fetch_tokens(self, wanted: WantedTokens) -> MediaEmbeds:
        """Nothing."""
        assert not wanted, "no prompt of a model of text only has media"
        return MediaEmbeds({}, {}, 0)

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        """`embeds` itself."""
        return embeds

    def backward(self, embeds: MediaEmbeds) -> None:
        """Nothing is trained."""

    def release(self) -> None:
        """Nothing is kept."""

    def blanked(self) -> NoMedia:
        """Itself."""
        return self

    def take_counts(self) -> None:
        """There is nothing to count."""

    def close(self) -> None:
        """Nothing is being read."""
