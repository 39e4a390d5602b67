# SPDX-License-Identifier: Apache-2.0
"""A family that exists only here, registered by one line, goes through everything that knows families.

It hears and sees: between the tokens of a video's units stand a timestamp, the tokens of its sound and a newline; its
last unit of sound is shorter; its decoder takes features of the encoders in two layers (DeepStack). The decoder is
Qwen3-VL's, so that vLLM has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from data.rows.prompts import PromptBuilder
from data.video.frames import FrameSettings
from data.video.pixels import CpuVideoDecoder
from data.video.prefetch import FramePrefetcher
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.protocols import MediaSpecs
from megatron_rl.rollout.vllm_engine import VllmEngine
from megatron_rl.training.batch import pack
from megatron_rl.training.microbatch import localize
from megatron_rl.types import (
    Completion,
    EncodedMedia,
    EngineModel,
    MediaItem,
    MediaKind,
    Placeholder,
    Prompt,
    Row,
    Run,
    Sampling,
    TrainSample,
    VisionPart,
)
from model_providers.decoder_weights import decoder_weight_map
from model_providers.family import FAMILIES, Family
from model_providers.provider import open_provider
from model_providers.qwen3 import weights as qwen3
from model_providers.shape import TransformerShape
from tests import tiny_policy as tp
from tests.rollout_parts import open_plain_engine
from tests.unit.test_data_audio import write_film
from tests.video_files import Kind, write_video
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

HIDDEN, LEVELS, WIDTH = 128, 2, 128 * 3
MELS, HOP = 6, 1600  # a column of the "spectrogram" is a tenth of a second
NEWLINE = 10


# --------------------------------------------------------------------------------------------------------- the family


@dataclass(frozen=True)
class Pictures:
    """Protocol MediaSpec: units of two frames, each of 2 x 2 tokens."""

    placeholder_ids: Mapping[MediaKind, int]
    patch_size: int = 16
    temporal_patch_size: int = 2
    frame_family: Literal["linspace"] = "linspace"

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        return 64, 64

    def tokens_per_unit(self, size_hw: tuple[int, int]) -> int:
        return 4

    def placeholder(self, item: MediaItem, sound: MediaItem | None = None) -> Placeholder:
        ids: list[int] = []
        spans: dict[str, list[Run]] = {part.key: [] for part in (item, sound) if part}
        for unit in range(max(part.num_units for part in (item, sound) if part)):
            ids.append(48 + unit % 10)  # the timestamp, one digit
            for part in (item, sound):
                if part is not None and unit < part.num_units:
                    first, last = part.tokens_of(unit, unit + 1)
                    spans[part.key].append((len(ids), len(ids) + last - first))
                    ids += [self.placeholder_ids["video"]] * (last - first)
            ids.append(NEWLINE)
        return Placeholder(tuple(ids), tuple(tuple(runs) for runs in spans.values()))


@dataclass(frozen=True)
class Sound:
    """Protocol AudioSpec: two columns make a token, eight a unit."""

    placeholder_id: int
    rate: int = 16_000
    num_mels: int = MELS
    frames_per_unit: int = 8
    tokens_per_unit: int = 4
    joins_video: bool = True

    def num_frames(self, num_samples: int) -> int:
        return num_samples // HOP

    def num_tokens(self, num_frames: int) -> int:
        return num_frames // 2

    def placeholder(self, item: MediaItem) -> Placeholder:
        return Placeholder((self.placeholder_id,) * item.num_tokens, (((0, item.num_tokens),),))

    def spectrogram(self, samples: NDArray[np.float32]) -> Tensor:
        columns = torch.from_numpy(samples[: len(samples) // HOP * HOP]).view(-1, HOP)
        return torch.stack([columns.abs().pow(n + 1).mean(1) for n in range(MELS)], dim=1)


class FakeEncoderOf:
    """Protocol MediaEncoder: one linear layer over what a token sees."""

    dtype, device = torch.float32, torch.device("cpu")
    trained: frozenset[VisionPart] = frozenset()
    version, is_original, is_trained, width = 0, True, False, WIDTH

    def __init__(self, kind: MediaKind, columns: int):
        self.kind = kind
        self.module: torch.nn.Module = torch.nn.Linear(columns, WIDTH)
        generator = torch.Generator().manual_seed(columns)
        with torch.no_grad():
            for param in self.module.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.module.named_parameters())

    def fingerprint(self) -> str:
        return hashlib.sha256(self.kind.encode()).hexdigest()

    @torch.no_grad()
    def encode(self, frames: Tensor, kind: MediaKind = "video") -> Tensor:
        assert kind == self.kind
        if kind == "audio":
            return self.module(frames[: len(frames) // 2 * 2].reshape(-1, 2 * MELS))
        cells = frames.float().div(255).view(-1, 2, 3, 2, 32, 2, 32).mean((4, 6))  # unit, frame, colour, y, x
        return self.module(cells.permute(0, 3, 4, 1, 2).reshape(-1, 6))

    def backward(self, frames: Tensor, grad: Tensor, kind: MediaKind = "video") -> None:
        raise AssertionError("not trained")


def specs_of(config: Mapping[str, Any], folder: Path, bounds: object) -> MediaSpecs:
    return MediaSpecs(Pictures({"video": config["video_token_id"]}), Sound(config["image_token_id"]))


def build_eyes(*parts: object) -> FakeEncoderOf:
    return FakeEncoderOf("video", 6)


def build_ears(*parts: object) -> FakeEncoderOf:
    return FakeEncoderOf("audio", 2 * MELS)


def positions_of(config: Mapping[str, Any]) -> Any:
    return positions


def positions(num_tokens: int, media: Sequence[MediaItem], spans: Sequence[Sequence[Run]]) -> Tensor:
    """Counting up in the first row; in the two others, tokens of media stand a little further back."""
    rows = torch.arange(num_tokens).repeat(3, 1)
    for item, runs in zip(media, spans, strict=True):
        for start, stop in runs:
            rows[1, start:stop] -= 1 if item.kind == "video" else 3
            rows[2, start:stop] -= torch.arange(stop - start) % 2
    return rows


def shape_of(config: Mapping[str, Any]) -> TransformerShape:
    return replace(qwen3.shape_of({**config["text_config"], "model_type": "qwen3"}), deepstack_levels=LEVELS)


FAKE = Family(
    "fake",
    shape_of,
    lambda shape: decoder_weight_map(shape, "language_model."),
    specs=f"{__name__}:specs_of",
    encoders={"video": f"{__name__}:build_eyes", "audio": f"{__name__}:build_ears"},
    positions=f"{__name__}:positions_of",
    engine=EngineModel(positions="mrope"),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_vl", FAKE)


# ---------------------------------------------------------------------------------------------------------- its files


@pytest.fixture(scope="module")
def folder(heavy_imports: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL; what its own vision encoder makes is not used."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    from model_providers.qwen3.tiny import tiny
    from scripts.make_tiny_checkpoint import VOCAB_SIZE, make_tokenizer

    out, tokenizer = tmp_path_factory.mktemp("fake"), make_tokenizer()
    ids = tokenizer.get_vocab()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    text = {**tiny(VOCAB_SIZE), "num_hidden_layers": 4, "head_dim": 32, "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(4)
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(out)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, temporal_patch_size=2, merge_size=2),
        video_processor=Qwen3VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three seconds with a tone."""
    scratch = tmp_path_factory.mktemp("film")
    picture = write_video(scratch / "pictures.mp4", Kind("libx264", {"g": "15"}))
    return write_film(scratch / "film.mkv", 0.0, picture)


def build_prompt(folder: Path, film: str, num_frames: int = 6) -> Prompt:
    from transformers import AutoTokenizer

    row = Row("made:1", "What is heard in <video>?", "A", videos=(film,), audios=(film,))
    builder = PromptBuilder(
        AutoTokenizer.from_pretrained(folder),
        open_provider(folder).specs,
        CpuVideoDecoder(1),
        frames=FrameSettings(num_frames),
        max_prompt_tokens=400,
    )
    return builder.build(0, row)


# ------------------------------------------------------------------------------------------------------------ its way


def test_a_prompt_says_where_every_token_of_sound_and_picture_stands(folder: Path, film: str) -> None:
    prompt = build_prompt(folder, film)
    video, sound = prompt.media
    assert (video.kind, video.num_units, video.num_tokens) == ("video", 3, 12)
    assert (sound.kind, sound.num_frames, sound.num_tokens, sound.num_units) == ("audio", 30, 15, 4)
    first = prompt.token_ids.index(48)  # the first timestamp
    assert prompt.spans[0] == tuple((first + at, first + at + 4) for at in (1, 11, 21))
    assert prompt.spans[1] == tuple((first + at, first + at + n) for at, n in ((5, 4), (15, 4), (25, 4), (31, 3)))
    rows = {at for runs in prompt.spans for run in runs for at in range(*run)}
    ordinary = [token for at, token in enumerate(prompt.token_ids[first : first + 35], first) if at not in rows]
    assert ordinary == [48, NEWLINE, 49, NEWLINE, 50, NEWLINE, 51, NEWLINE]


def _fill(engine: VllmEngine, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    engine.load_hf((name, tensor) for name, tensor in tensors.items() if "visual" not in name)
    engine.weights_changed(0)


def _on_a_rank(rank: int, folder: Path, prompt: Prompt) -> tuple[list[Completion], Tensor, Tensor, list[int]]:
    """(what the engine sampled, the trainer's log-probabilities minus the engine's, the largest difference between rows
    made by all ranks together and by one alone, the width of the tables of this rank's own tokens)."""
    mesh = tp.join(context=2)
    trainer = tp.open_trainer(folder, mesh, tp.MEASURE)
    encoder = trainer.provider.build_encoder(tp.BACKEND, torch.device("cpu"))
    assert encoder is not None and encoder.width == WIDTH
    frames = FramePrefetcher(CpuVideoDecoder(1), 0, sound=trainer.provider.specs.sound)
    together = ParallelEncoder(encoder, frames, frames_per_chunk=8)
    assert together.encode(prompt.media) == {}
    media = together.fetch(prompt.media)
    off = torch.stack([(media.tables[m.key] - _alone(m)).abs().max() for m in prompt.media])

    engine = open_plain_engine(folder)
    _fill(engine, folder)
    text = replace(prompt, prompt_id=1, token_ids=tuple(range(60, 90)), media=(), spans=())
    shared = [engine.generate([prompt, text], media, Sampling(3, 1.0, 8, seed=2))]
    dist.broadcast_object_list(shared, src=0)
    by_id = {0: prompt, 1: text}
    groups = [
        [TrainSample(p, c.token_ids, c.logprobs) for c in shared[0] if c.prompt_id == n] for n, p in by_id.items()
    ]
    batches, wanted = localize(pack(groups, 1, 4096, trainer.provider, mesh)[0].batches)
    embeds = together.fetch_tokens(wanted)
    scores = trainer.policy.logprobs(batches, embeds.tables)
    gaps = [s - b.rollout_logprobs for s, b in zip(scores, batches, strict=True) if s is not None]
    return shared[0], torch.cat([torch.zeros(0), *gaps]), off, [table.shape[1] for table in embeds.tables.values()]


def _alone(item: MediaItem) -> Tensor:
    from data.audio import decode_audio

    if item.kind == "audio":
        return build_ears().encode(Sound(0).spectrogram(decode_audio(item.path)), "audio")
    return build_eyes().encode(CpuVideoDecoder(1).decode(item.path, item.frame_indices, item.size_hw))


def test_trainer_and_engine_agree_about_sound_and_pictures(folder: Path, film: str) -> None:
    """Encoded by two ranks, packed with a shared prompt, split for context parallelism, against vLLM."""
    ranks = run_world(2, _on_a_rank, folder, build_prompt(folder, film, num_frames=40), timeout=240)
    for completions, _, off, widths in ranks:
        assert len({c.token_ids for c in completions}) == 6 and float(off.max()) < 1e-5
        assert set(widths) == {WIDTH}, "a rank without media of its own tests nothing"
    gaps = torch.cat([gaps for _, gaps, *_ in ranks])
    assert len(gaps) == sum(len(c.token_ids) for c in ranks[0][0])
    assert float(gaps.abs().max()) < 1e-4


def _without_features(rank: int, folder: Path, prompt: Prompt) -> float:
    """How much the engine's log-probabilities depend on the columns behind the input embeddings."""
    tp.join()
    engine = open_plain_engine(folder)
    _fill(engine, folder)
    generator = torch.Generator().manual_seed(1)
    tables = {m.key: torch.randn(m.num_tokens, WIDTH, generator=generator) for m in prompt.media}
    without = {key: table.clone().index_fill_(1, torch.arange(HIDDEN, WIDTH), 0.0) for key, table in tables.items()}
    greedy = Sampling(1, 1.0, 1, seed=0, greedy=True)
    [(a,), (b,)] = (
        engine.generate([prompt], EncodedMedia(made, name), greedy)
        for made, name in ((tables, "with"), (without, "without"))
    )
    return abs(a.logprobs[0] - b.logprobs[0])


def test_the_engine_reads_the_features_of_later_layers(folder: Path, film: str) -> None:
    [change] = run_world(1, _without_features, folder, build_prompt(folder, film), timeout=240)
    assert change > 1e-3
