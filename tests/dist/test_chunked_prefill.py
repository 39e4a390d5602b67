# SPDX-License-Identifier: Apache-2.0
"""A prompt whose media are cut by the engine's scheduler scores as one that is computed at once.

On a GPU vLLM computes long prompts in chunks. Nothing but its random numbers keeps it from that on a CPU, and greedy
sampling draws none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_rl.types import EncodedMedia, MediaItem, Prompt, Run, Sampling
from model_providers.positions import text_positions
from model_providers.provider import FamilyProvider, open_provider
from tests import rollout_parts
from tests.rollout_parts import fill_with_hf_weights, open_plain_engine, text_prompt, video_prompt
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

WIDTH, NUM_TOKENS = 128, 16
Scores = list[tuple[tuple[int, ...], tuple[float, ...]]]


def _placed(prompt_id: int, items: Sequence[MediaItem], pieces: int, token: int) -> Prompt:
    """The items in so many runs each, in turn, with text between."""
    ids, spans = [10, 11], [list[Run]() for _ in items]
    for piece in range(pieces):
        for item, runs in zip(items, spans, strict=True):
            first, last = (item.num_tokens * edge // pieces for edge in (piece, piece + 1))
            runs.append((len(ids), len(ids) + last - first))
            ids += [token] * (last - first) + [30, 31]
    return replace(text_prompt(prompt_id, ids), media=tuple(items), spans=tuple(map(tuple, spans)))


def _prompts(provider: FamilyProvider) -> list[Prompt]:
    alone = [
        video_prompt(i, provider, grid, key=str(grid)) for i, grid in enumerate([(8, 8, 8), (2, 4, 6), (20, 8, 8)])
    ]
    (first,), (second,), (third,) = (prompt.media for prompt in alone)
    token = provider.specs.placeholder_ids["video"]
    return [
        *alone,
        text_prompt(3, range(5, 120)),
        _placed(4, [first, second], 1, token),
        _placed(5, [first, first], 1, token),
        _placed(6, [third], 8, token),
        _placed(7, [first, second], 4, token),  # among each other
    ]


def _score(rank: int, folder: Path, chunk: int) -> list[Scores]:
    """Greedy responses for two sets of embeddings of the same items, one after the other; `chunk` 0: not cut."""
    backend = rollout_parts.choose_backend("cpu", "float32")
    if chunk:
        backend = replace(backend, chunked_prefill=True, prefill_tokens=chunk)
    provider, generator = open_provider(folder), torch.Generator().manual_seed(0)
    assert isinstance(provider, FamilyProvider)
    provider.position_ids = text_positions  # the model's own rule knows no pieces
    with (
        mock.patch.object(rollout_parts, "choose_backend", lambda *_: backend),
        mock.patch.object(rollout_parts, "open_provider", lambda _: provider),
    ):
        engine = open_plain_engine(folder, max_model_len=512)
    fill_with_hf_weights(engine, folder)
    prompts, sampling = _prompts(provider), Sampling(1, 1.0, NUM_TOKENS, seed=1, greedy=True)
    items = {item.key: item for prompt in prompts for item in prompt.media}
    results = []
    for version in ("0", "1"):
        tables = {key: torch.randn(item.num_tokens, WIDTH, generator=generator) for key, item in items.items()}
        found = engine.generate(prompts, EncodedMedia(tables, version), sampling)
        results.append([(c.token_ids, c.logprobs) for c in found])
    return results


def test_media_cut_by_the_scheduler_are_scored_alike(tiny_checkpoint: Path) -> None:
    [whole], [cut] = (run_world(1, _score, tiny_checkpoint, chunk, timeout=120) for chunk in (0, 33))
    for expected, found in zip(whole, cut, strict=True):
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        gaps = [abs(a - b) for (_, e), (_, f) in zip(expected, found, strict=True) for a, b in zip(e, f, strict=True)]
        assert len(gaps) == len(expected) * NUM_TOKENS and max(gaps) < 1e-4
    assert whole[0] != whole[1], "other embeddings, other scores"
