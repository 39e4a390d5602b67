# SPDX-License-Identifier: Apache-2.0
"""What vision.py measures with: a model in the proportions of Qwen2.5-VL-7B, videos, training groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.types import MediaItem, Prompt, Row, TrainSample, VideoInfo
from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

PATCH, MERGE = 14, 2
RESPONSE_TOKENS = 32


def write_checkpoint(folder: Path, longest: int) -> None:
    """A language model and a tower whose costs for a video token are as 1 to 0.4, as they are in Qwen2.5-VL-7B."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, max_positions=longest)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 1408, 4
    text.num_attention_heads, text.num_key_value_heads = 8, 2
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision: Any = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 4, 96, 256, 256
    vision.fullatt_block_indexes = [3]
    make_model(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def artifact(path: str, num_frames: int, side: int) -> MediaItem:
    grid = (num_frames // 2, side // PATCH, side // PATCH)
    times = tuple(i / 2 for i in range(num_frames))
    per_unit = grid[1] * grid[2] // MERGE**2
    frames, size, num_tokens = tuple(range(num_frames)), (side, side), grid[0] * per_unit
    return MediaItem(path, path, frames, times, size, grid, 1.0, num_tokens, num_frames, 2, per_unit)


def make_groups(provider: Any, videos: Sequence[MediaItem], num_responses: int) -> list[list[TrainSample]]:
    rng = random.Random(0)
    groups = []
    for number, video in enumerate(videos):
        text = [rng.randrange(256) for _ in range(16)]
        ids = (*text, *[provider.specs.placeholder_ids["video"]] * video.num_tokens, *text)
        spans = (((len(text), len(text) + video.num_tokens),),)
        prompt = Prompt(number, Row(f"made:{number}", "", ""), ids, (video,), spans)
        groups.append([_response(rng, prompt) for _ in range(num_responses)])
    return groups


def _response(rng: random.Random, prompt: Prompt) -> TrainSample:
    ids = tuple(rng.randrange(256) for _ in range(RESPONSE_TOKENS))
    return TrainSample(prompt, ids, tuple(rng.uniform(-6.5, -5.0) for _ in ids))


class Frames:
    """A decoder (protocol VideoDecoder) of videos that lie in memory."""

    def __init__(self, videos: Mapping[str, Tensor]):
        self._videos = videos

    def probe(self, path: str) -> VideoInfo:
        raise AssertionError(f"{path}: nothing asks for this here")

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        return self._videos[path][list(frame_indices)]


class EncodedOnUse(Mapping[str, Tensor]):
    """The embeddings of whole videos, made each time they are asked for."""

    def __init__(self, cache_of_one: Callable[[str], Tensor], keys: Sequence[str]):
        self._encode, self._keys = cache_of_one, keys

    def __getitem__(self, key: str) -> Tensor:
        return self._encode(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
