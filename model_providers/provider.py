# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint folder: everything that the rest of the system asks of its model, whatever the family."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from megatron_rl.protocols import MediaEncoder, MediaSpecs, ModelProvider, PositionRule
from megatron_rl.runtime.device import Backend
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.types import VisionPart
from model_providers.encoders import EncodersByKind
from model_providers.family import (
    BuildEncoder,
    Config,
    Family,
    PixelBounds,
    PositionsOf,
    SpecsOf,
    family_of,
    imported,
    read_config,
    shape_and_weights,
)
from model_providers.hf_checkpoint import HfCheckpoint, load_stage
from model_providers.positions import text_positions
from model_providers.transformer import ChunkedStage, LanguageModel, TokenPolicy, build_language_model


def open_provider(
    folder: str | Path, min_pixels: int = 100_352, max_pixels: int = 602_112, total_pixels: int = 0
) -> ModelProvider:
    """The provider of a Hugging Face checkpoint folder. `min_pixels`, `max_pixels` bound the area of a frame after
    resizing, `total_pixels` (0 = not) that of all frames of a video together. Raises ValueError."""
    config = read_config(folder)
    bounds = PixelBounds(min_pixels, max_pixels, total_pixels)
    return FamilyProvider(Path(folder), config, family_of(config, folder), bounds)


class FamilyProvider:
    """A checkpoint folder seen through the table of its family (protocol ModelProvider)."""

    def __init__(self, folder: Path, config: Config, family: Family, bounds: PixelBounds):
        self.folder, self.family, self._config = folder, family, config
        self.shape, self.weight_map = shape_and_weights(config, folder)
        self.engine = replace(
            family.engine, folder=str(folder / family.engine.folder), deepstack_levels=self.shape.deepstack_levels
        )
        self.specs = MediaSpecs()
        if family.specs:
            specs_of: SpecsOf = imported(family.specs)
            self.specs = specs_of(config, folder, bounds)
        self.position_ids: PositionRule = text_positions
        if family.positions:
            positions_of: PositionsOf = imported(family.positions)
            self.position_ids = positions_of(config)

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        """Placeholders that a sampled response must not contain: the engine would look for media behind them."""
        ids = self.specs.placeholder_ids.values()
        return tuple(sorted({token for token in ids if token < self.shape.vocab_size}))

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

    def build_encoder(
        self, backend: Backend, device: torch.device, trained: frozenset[VisionPart] = frozenset()
    ) -> MediaEncoder | None:
        """One encoder, or several by kind of media; None for a family of text only."""
        built: dict[str, MediaEncoder] = {}
        for reference in self.family.encoders.values():
            if reference not in built:
                build: BuildEncoder = imported(reference)
                built[reference] = build(self._config, self.checkpoint, self.specs, backend, device, trained)
        if len(built) > 1:
            return EncodersByKind({kind: built[name] for kind, name in self.family.encoders.items()})
        return next(iter(built.values()), None)
