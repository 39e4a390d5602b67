# SPDX-License-Identifier: Apache-2.0
"""A prompt as vLLM's own already processed input: our token ids, our embeddings, our positions, for every family
alike.

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

Placed = tuple[MediaItem, Sequence[Run]]  # an item and the runs of tokens that it fills


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
    for stretch in _stretches(prompt):
        kind = stretch[0][0].kind
        rows.setdefault(kind, []).append(_rows(_in_token_order(stretch, media), positions))
        identities.setdefault(kind, []).append("+".join(identity(item, media.made_by) for item, _ in stretch))
        ranges.setdefault(kind, []).append(_range(sorted(run for _, runs in stretch for run in runs)))
    return mm_input(ids, MultiModalKwargsItems(rows), identities, ranges)


def _stretches(prompt: Prompt) -> list[list[Placed]]:
    """The items with their runs; those that stand among each other together: vLLM 0.32 takes the rows of one item after
    those of another, whatever the order of their tokens."""
    stretches: list[list[Placed]] = []
    stop = -1
    for item, runs in zip(prompt.media, prompt.spans, strict=True):
        if runs[0][0] < stop:
            stretches[-1].append((item, runs))
        else:
            stretches.append([(item, runs)])
        stop = max(stop, runs[-1][1])
    return stretches


def _in_token_order(stretch: Sequence[Placed], media: EncodedMedia) -> Tensor:
    """[n, width], n the tokens of all its items; of a single item its own table, so that no copy is made."""
    tables = [media.tables[item.key] for item, _ in stretch]
    if len(stretch) == 1:
        return tables[0]
    parts: list[tuple[int, Tensor]] = []
    for table, (_, runs) in zip(tables, stretch, strict=True):
        lengths = [stop - start for start, stop in runs]
        parts += [(start, part) for (start, _), part in zip(runs, table.split(lengths), strict=True)]
    return torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0])])


def identity(item: MediaItem, made_by: str) -> str:
    """By which the engine knows an item in its caches: what was encoded, by what, and what moves the positions of the
    tokens behind it."""
    known = (item.key, made_by, item.kind, item.grid_thw, item.seconds_per_grid, item.num_tokens)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _rows(embeds: Tensor, positions: Tensor) -> MultiModalKwargsItem:
    """`embeds` [n, width] and the positions of the whole prompt, int64 [3, P]."""
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

    return MultiModalKwargsItem(
        {
            "embeds": MultiModalFieldElem(data=embeds, field=MultiModalBatchedField()),
            "positions": MultiModalFieldElem(data=positions, field=MultiModalBatchedField(keep_on_cpu=True)),
        }
    )


def _range(runs: Sequence[Run]) -> PlaceholderRange:
    """From the first token of the runs to the last; where others stand between them, with a mask."""
    from vllm.multimodal.inputs import PlaceholderRange

    start, stop = runs[0][0], runs[-1][1]
    if len(runs) == 1:
        return PlaceholderRange(offset=start, length=stop - start)
    mask = torch.zeros(stop - start, dtype=torch.bool)
    for first, last in runs:
        mask[first - start : last - start] = True
    return PlaceholderRange(offset=start, length=stop - start, is_embed=mask)
