# SPDX-License-Identifier: Apache-2.0
"""A prompt as vLLM's own already processed input: our token ids, our rows, our positions, for every family alike.

No processor of vLLM's runs, so nothing is expanded twice and nothing is decided a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.protocols import PositionRule
from megatron_rl.types import EncodedMedia, MediaItem, Prompt, Run

if TYPE_CHECKING:
    from vllm.inputs import EngineInput
    from vllm.multimodal.inputs import MultiModalKwargsItem, PlaceholderRange


def engine_input(prompt: Prompt, media: EncodedMedia, position_ids: PositionRule) -> EngineInput:
    """What `LLMEngine.add_request` takes; `media` holds the rows of all items of the prompt."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    ids = list(prompt.token_ids)
    if not prompt.media:
        return tokens_input(ids)
    positions = position_ids(len(ids), prompt.media, prompt.spans)
    rows: dict[str, list[MultiModalKwargsItem]] = {}
    identities: dict[str, list[str]] = {}
    ranges: dict[str, list[PlaceholderRange]] = {}
    for item, runs in zip(prompt.media, prompt.spans, strict=True):
        rows.setdefault(item.kind, []).append(_rows(media.tables[item.key], positions))
        identities.setdefault(item.kind, []).append(identity(item, media.made_by))
        ranges.setdefault(item.kind, []).append(_range(runs))
    return mm_input(ids, MultiModalKwargsItems(rows), identities, ranges)


def identity(item: MediaItem, made_by: str) -> str:
    """By which the engine knows an item in its caches: what was encoded, by what, and what moves the positions of the
    tokens behind it."""
    known = (item.key, made_by, item.kind, item.grid_thw, item.seconds_per_grid, item.num_tokens)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _rows(embeds: Tensor, positions: Tensor) -> MultiModalKwargsItem:
    """`embeds` [num_tokens, width] and the positions of the whole prompt, [3, tokens]."""
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

    return MultiModalKwargsItem(
        {
            "embeds": MultiModalFieldElem(data=embeds, field=MultiModalBatchedField()),
            "positions": MultiModalFieldElem(data=positions, field=MultiModalBatchedField(keep_on_cpu=True)),
        }
    )


def _range(runs: Sequence[Run]) -> PlaceholderRange:
    """From the first token of an item to its last; where others stand between them, with a mask of its own."""
    from vllm.multimodal.inputs import PlaceholderRange

    start, stop = runs[0][0], runs[-1][1]
    if len(runs) == 1:
        return PlaceholderRange(offset=start, length=stop - start)
    mask = torch.zeros(stop - start, dtype=torch.bool)
    for first, last in runs:
        mask[first - start : last - start] = True
    return PlaceholderRange(offset=start, length=stop - start, is_embed=mask)
