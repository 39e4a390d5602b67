# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of Qwen2.5-VL: by hand, as vLLM's model class computes them, and where transformers differs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.types import MediaItem
from model_providers.qwen2_5_vl.positions import rope_positions
from tests.media_items import made_video

MERGE, RATE = 2, 2.0  # the spatial merge and the tokens per second of published checkpoints
TEXT_TOKEN, VIDEO_TOKEN = 7, 263

Clip = tuple[tuple[int, int, int], float]  # grid (t, h, w) in patches, seconds between its steps

SHORT: list[Clip] = [((2, 4, 4), 0.5)]
MIXED: list[Clip] = [((3, 4, 6), 1.0), ((2, 8, 4), 0.25)]
LONG: list[Clip] = [((40, 4, 4), 1.0)]
UNEVEN: list[Clip] = [((9, 4, 4), 1 / 3), ((30, 6, 4), 0.7), ((5, 4, 8), 3.3)]


def _video(clip: Clip) -> MediaItem:
    (t, h, w), seconds = clip
    return made_video("", (t, h, w), h * w // MERGE**2, seconds)


def _prompt(clips: Sequence[Clip]) -> tuple[list[int], list[int], list[MediaItem]]:
    """Token ids with three text tokens around every video, where the videos start, the videos."""
    ids, starts, videos = [TEXT_TOKEN] * 3, [], [_video(c) for c in clips]
    for video in videos:
        starts.append(len(ids))
        ids += [VIDEO_TOKEN] * video.num_tokens + [TEXT_TOKEN] * 3
    return ids, starts, videos


def _positions(num_tokens: int, starts: Sequence[int], videos: Sequence[MediaItem]) -> Tensor:
    spans = [[(start, start + video.num_tokens)] for start, video in zip(starts, videos, strict=True)]
    return rope_positions(num_tokens, videos, spans, merge_size=MERGE, tokens_per_second=RATE)


def _ours(clips: Sequence[Clip]) -> Tensor:
    ids, starts, videos = _prompt(clips)
    return _positions(len(ids), starts, videos)


def _transformers(clips: Sequence[Clip]) -> Tensor:
    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = Qwen2_5_VLConfig()
    config.vision_config.spatial_merge_size, config.vision_config.tokens_per_second = MERGE, int(RATE)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    ids = torch.tensor([_prompt(clips)[0]])
    grids, seconds = (torch.tensor(column) for column in zip(*clips, strict=True))
    kinds = (ids == VIDEO_TOKEN).int() * 2
    return model.get_rope_index(ids, kinds, video_grid_thw=grids, second_per_grid_ts=seconds)[0][:, 0]


def _vllm(clips: Sequence[Clip]) -> Tensor:
    """vLLM's model without its weights: the method reads the configuration only."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.__new__(Qwen2_5_VLForConditionalGeneration)
    torch.nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=RATE)
    model.config = SimpleNamespace(vision_config=vision)
    ids, starts, videos = _prompt(clips)
    features = [
        SimpleNamespace(
            modality="video",
            mm_position=SimpleNamespace(offset=start),
            data={
                "video_grid_thw": SimpleNamespace(data=torch.tensor(video.grid_thw)),
                "second_per_grid_ts": SimpleNamespace(data=torch.tensor(video.seconds_per_grid)),
            },
        )
        for start, video in zip(starts, videos, strict=True)
    ]
    return model.get_mrope_input_positions(ids, features)[0]


def test_text_counts_up_in_all_rows() -> None:
    assert _positions(4, [], []).tolist() == [[0, 1, 2, 3]] * 3


def test_by_hand() -> None:
    """Two text tokens, two steps of 2 x 2 tokens 1.5 s apart (3 positions at 2 tokens a second), two text tokens."""
    video = _video(((2, 4, 4), 1.5))
    assert _positions(12, [2], [video]).tolist() == [
        [0, 1, 2, 2, 2, 2, 5, 5, 5, 5, 6, 7],
        [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 6, 7],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 6, 7],
    ]


def test_a_video_at_either_end() -> None:
    video = _video(((1, 2, 4), 1.0))
    assert _positions(4, [0, 2], [video, video]).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("clips", [SHORT, MIXED, LONG, UNEVEN], ids=["short", "mixed", "long", "uneven"])
def test_as_vllm(heavy_imports: None, clips: list[Clip]) -> None:
    assert torch.equal(_ours(clips), _vllm(clips))


def test_every_spacing_as_vllm(heavy_imports: None) -> None:
    """The rounding of fractional times, over many lengths of a step."""
    for hundredths, steps in itertools.product(range(1, 400, 7), (2, 31)):
        clips = [((steps, 4, 4), hundredths / 100)]
        assert torch.equal(_ours(clips), _vllm(clips)), clips


def test_as_transformers_while_space_outgrows_time() -> None:
    clips: list[Clip] = [((2, 4, 4), 0.5), ((3, 8, 6), 0.5)]
    assert torch.equal(_ours(clips), _transformers(clips))


def test_transformers_lets_text_stand_before_the_end_of_a_long_video() -> None:
    """Pins the difference: the video itself agrees, the text behind it starts at a different position."""
    ours, theirs = _ours(LONG), _transformers(LONG)
    assert torch.equal(ours[:, :-3], theirs[:, :-3])
    last_frame = 3 + 39 * 2
    assert ours[:, -3:].tolist() == [[last_frame + 1, last_frame + 2, last_frame + 3]] * 3
    assert theirs[:, -3:].tolist() == [[3 + 2, 3 + 3, 3 + 4]] * 3
