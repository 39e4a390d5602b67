# SPDX-License-Identifier: Apache-2.0
"""What a job reads, from its recipe: rows, tokenizer, prompts, answers. No model is needed for any of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.rows.answers import AnswerEncoder
from data.rows.dataset import DataSet, RowFormat, read_rows
from data.rows.manifest import Manifest
from data.rows.prompts import PromptBuilder
from data.video.frames import FrameSettings
from megatron_rl.config.schema import CacheConfig, DataConfig, SftConfig
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.protocols import MediaSpecs, VideoDecoder
from megatron_rl.types import Row
from model_providers.family import PixelBounds, SpecsOf, family_of, imported, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("data.train", "data.eval")


def data_sets(
    data: DataConfig, field: str, embedded: Path, limit: int = 0, on_record: Callable[[], None] = lambda: None
) -> list[DataSet]:
    """The data sets that `field`, one of FIELDS, names; none where it is empty. `limit`, `on_record` as for read_rows.
    Raises ValueError."""
    setting = data.train if field == "data.train" else data.eval
    if not setting:
        return []
    form = RowFormat({name: column for name, column in asdict(data.columns).items() if column}, data.turns)
    return read_rows(setting, data.media_root, embedded, field, form, limit, on_record)


def usable_rows(data: DataConfig, field: str, quarantine: Quarantine) -> list[list[Row]]:
    """Usable rows of each data set of `field`; the others are counted and listed, unused columns are named."""
    found = data_sets(data, field, quarantine.path.parent / "media")
    for part in found:
        for text in part.notes():
            quarantine.note(f"{field}={text}")
        quarantine.add(part.bad, len(part.rows) + len(part.bad), where=f"{field}={part.name}")
    return [part.rows for part in found]


def repeat_note(data: list[list[Row]], batch_size: int) -> str | None:
    """Whether a batch holds rows more than once, in words."""
    num_rows = sum(map(len, data))
    if batch_size <= num_rows:
        return None
    return (
        f"train.prompts_per_step={batch_size}: data.train has {num_rows} usable rows, so that a batch holds rows more "
        f"than once; lower it to {num_rows} or less"
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def media_specs(cfg: CacheConfig) -> MediaSpecs:
    """What the model of the recipe takes beside text, from its config.json. Raises ValueError."""
    config = read_config(cfg.model.hf)
    family = family_of(config, cfg.model.hf)
    if not family.specs:
        return MediaSpecs()
    specs_of: SpecsOf = imported(family.specs)
    bounds = PixelBounds(cfg.data.min_pixels, cfg.data.max_pixels, cfg.data.total_pixels)
    return specs_of(config, Path(cfg.model.hf), bounds)


def build_prompt_builder(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, specs: MediaSpecs, decoder: VideoDecoder
) -> PromptBuilder:
    return PromptBuilder(
        tokenizer,
        specs,
        decoder,
        format_prompt=data.format_prompt,
        frames=FrameSettings(data.num_frames, data.fps, data.min_frames, data.max_frames, data.frame_rule),
        max_prompt_tokens=data.max_prompt_tokens,
        manifest=Manifest(data.manifest) if data.manifest else None,
    )


def build_answer_encoder(cfg: SftConfig, tokenizer: PreTrainedTokenizerBase) -> AnswerEncoder:
    return AnswerEncoder(tokenizer, cfg.train.max_answer_tokens)
