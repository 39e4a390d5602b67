# SPDX-License-Identifier: Apache-2.0
"""A model of text only: nothing to encode, and a medium is refused by its path."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.media.no_media import NoMedia
from megatron_rl.observe.step_metrics import media_metrics
from megatron_rl.types import MediaEmbeds
from tests.media_items import made_video

ITEM = replace(made_video("a", (2, 2, 2), 1), path="a.mp4")


@pytest.mark.parametrize("ask", ["encode", "fetch", "prefetch"])
def test_a_medium_is_refused_by_name(ask: str) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4: this model takes no audio; use a model that does"):
        getattr(NoMedia(), ask)([replace(ITEM, kind="audio"), ITEM])


def test_text_passes() -> None:
    nothing = NoMedia()
    nothing.prefetch([])
    assert nothing.encode([]) == {} and dict(nothing.fetch([]).tables) == {}
    embeds = nothing.fetch_tokens({})
    assert embeds == MediaEmbeds({}, {}, 0) and nothing.refreshed(embeds) is embeds
    nothing.backward(embeds)
    assert nothing.take_counts() is None and media_metrics(nothing.take_counts()) == {}
    assert nothing.blanked().encode([]) == {}
