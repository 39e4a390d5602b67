# SPDX-License-Identifier: Apache-2.0
"""Everything that the rest of the system asks of the Qwen2.5-VL family, read from the checkpoint's config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.runtime.device import Backend
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.types import MediaItem, Prompt, VisionPart
from model_providers.hf_checkpoint import HfCheckpoint, load_stage
from model_providers.qwen2_5_vl.positions import rope_positions
from model_providers.qwen2_5_vl.vision import QwenMediaSpec, VisionTower, build_tower
from model_providers.qwen2_5_vl.weights import shape_of, weight_map
from model_providers.transformer import ChunkedStage, LanguageModel, TokenPolicy, build_language_model

# Fallbacks of transformers' Qwen2VLVideoProcessor, for checkpoints without preprocessor files.
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Qwen2_5_VL:
    """Provider of one checkpoint folder. `min_pixels`, `max_pixels` bound the frame area after resizing,
    `total_pixels` (0 = not) that of all frames of a video together."""

    model_type = "qwen2_5_vl"

    def __init__(self, folder: str | Path, min_pixels: int, max_pixels: int, total_pixels: int = 0):
        self.folder = Path(folder)
        config = json.loads((self.folder / "config.json").read_text())
        self._text: dict[str, Any] = config.get("text_config") or config
        self._vision: dict[str, Any] = config["vision_config"]
        self.image_token_id: int = config["image_token_id"]
        self.video_token_id: int = config["video_token_id"]
        self.shape = shape_of(config)
        self.weight_map = weight_map(self.shape)
        self.video_spec = self._video_spec(min_pixels, max_pixels, total_pixels)

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        """Placeholders that a sampled response must not contain: the engine would look for media behind them."""
        return (self.image_token_id, self.video_token_id)

    @cached_property
    def checkpoint(self) -> HfCheckpoint:
        return HfCheckpoint(self.folder)

    def build_language(
        self, backend: Backend, mesh: ParallelMesh, temperature: float = 1.0, recompute: str = "none"
    ) -> LanguageModel | ChunkedStage:
        """This rank's pipeline stage, uninitialised."""
        tokens = TokenPolicy(temperature, self.forbidden_tokens)
        return build_language_model(self.shape, backend, mesh, tokens, recompute)

    def load_language(self, model: LanguageModel | ChunkedStage, mesh: ParallelMesh) -> None:
        """Fill this stage with its part of the HF weights, reading only that part."""
        load_stage(model, self.weight_map, self.checkpoint, mesh)

    def build_vision(
        self, backend: Backend, device: torch.device, trained: frozenset[VisionPart] = frozenset()
    ) -> VisionTower:
        return build_tower(self._vision, self.checkpoint, self.video_spec, backend, device, trained)

    def position_ids(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> Tensor:
        """int64 [3, len(token_ids)] rotary positions; response tokens may follow the prompt's."""
        starts = self.video_starts(token_ids, videos)
        rate = float(self._vision.get("tokens_per_second", 4))
        return rope_positions(len(token_ids), starts, videos, self.video_spec.merge_size, rate)

    def video_starts(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> list[int]:
        """Index of the first placeholder token of each video or image."""
        starts, position = [], 0
        for video in videos:
            position = list(token_ids).index(self._placeholder(video), position)
            starts.append(position)
            position += video.num_tokens
        return starts

    def engine_prompt(self, prompt: Prompt, embeds: Mapping[str, Tensor]) -> dict[str, Any]:
        """vLLM's input: one placeholder a video or image (vLLM expands it itself) and the embeddings in its place.

        Without ids of ours, vLLM's caches go by the content of the embeddings, which cannot be stale.
        """
        ids = list(prompt.token_ids)
        starts = self.video_starts(ids, prompt.videos)
        for start, video in reversed(list(zip(starts, prompt.videos, strict=True))):
            ids[start : start + video.num_tokens] = [self._placeholder(video)]
        request: dict[str, Any] = {"prompt_token_ids": ids}
        data: dict[str, dict[str, Tensor]] = {}
        uuids: dict[str, list[str]] = {}
        for kind in ("image", "video"):
            items = [v for v in prompt.videos if v.is_image == (kind == "image")]
            if items:
                made = [embeds[v.key] for v in items]
                data[kind] = {
                    # Of a single item the very tensor: copies of all prompts' would stand beside them.
                    f"{kind}_embeds": made[0] if len(made) == 1 else torch.cat(made),
                    f"{kind}_grid_thw": torch.tensor([v.grid_thw for v in items]),
                }
                uuids[kind] = [_identity(embeds[v.key], v) for v in items]
                if kind == "video":
                    data[kind]["second_per_grid_ts"] = torch.tensor([v.seconds_per_grid for v in items])
        if data:
            request |= {"multi_modal_data": data, "multi_modal_uuids": uuids}
        return request

    def _placeholder(self, video: MediaItem) -> int:
        return self.image_token_id if video.is_image else self.video_token_id

    def _video_spec(self, min_pixels: int, max_pixels: int, total_pixels: int) -> QwenMediaSpec:
        processor: dict[str, Any] = {}
        for file in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
            if (self.folder / file).is_file():
                settings = json.loads((self.folder / file).read_text())
                processor |= settings.get("video_processor", settings)
        return QwenMediaSpec(
            patch_size=self._vision["patch_size"],
            temporal_patch_size=self._vision["temporal_patch_size"],
            merge_size=self._vision["spatial_merge_size"],
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            total_pixels=total_pixels,
            placeholder_id=self.video_token_id,
            image_placeholder_id=self.image_token_id,
            mean=tuple(processor.get("image_mean", OPENAI_CLIP_MEAN)),
            std=tuple(processor.get("image_std", OPENAI_CLIP_STD)),
        )


def _identity(embeds: Tensor, video: MediaItem) -> str:
    """By which the engine knows a video in its caches: the embeddings and where in time they stand.

    vLLM 0.32's own hash leaves out the time, and would reuse a prefix that was computed at other positions.
    """
    digest = hashlib.sha256(repr((video.grid_thw, video.seconds_per_grid)).encode())
    digest.update(embeds.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
