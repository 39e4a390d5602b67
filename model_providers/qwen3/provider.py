# SPDX-License-Identifier: Apache-2.0
"""Everything that the rest of the system asks of a Qwen text model, read from the checkpoint's config.json."""

from __future__ import annotations

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
from model_providers.qwen3.weights import shape_of, weight_map
from model_providers.transformer import ChunkedStage, LanguageModel, TokenPolicy, build_language_model


class QwenText:
    """Provider of one checkpoint folder. It takes no video, so the bounds of a frame's area have no effect."""

    model_types = ("qwen2", "qwen3", "qwen3_moe")
    video_spec = None
    video_token_id = None
    image_token_id = None
    forbidden_tokens: tuple[int, ...] = ()

    def __init__(self, folder: str | Path, min_pixels: int, max_pixels: int, total_pixels: int = 0):
        self.folder = Path(folder)
        self.shape = shape_of(json.loads((self.folder / "config.json").read_text()))
        self.weight_map = weight_map(self.shape)

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
    ) -> None:
        """There is no tower."""

    def position_ids(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> Tensor:
        """int64 [3, len(token_ids)]: three equal rows, counting up."""
        self.video_starts(token_ids, videos)
        return torch.arange(len(token_ids)).expand(3, -1)

    def video_starts(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> list[int]:
        if videos:
            raise ValueError(f"{videos[0].path}: {self.folder} holds a text model, which takes no video")
        return []

    def engine_prompt(self, prompt: Prompt, embeds: Mapping[str, Tensor]) -> dict[str, Any]:
        self.video_starts(prompt.token_ids, prompt.videos)
        return {"prompt_token_ids": list(prompt.token_ids)}
