# SPDX-License-Identifier: Apache-2.0
"""Every seam of the system on one page. A Protocol is here only if two implementations (one may be a test's fake)
exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from megatron_rl.media.encoder import EncoderCounts
    from megatron_rl.runtime.device import Backend
    from megatron_rl.runtime.parallel import ParallelMesh
    from megatron_rl.types import (
        AdvantageInputs,
        Advantages,
        Completion,
        Corrected,
        EncodedMedia,
        EngineModel,
        Group,
        LossInputs,
        LossOutput,
        MediaEmbeds,
        MediaItem,
        MediaKind,
        Placeholder,
        Prompt,
        RolloutBatch,
        Run,
        Sampling,
        SyncReport,
        VideoInfo,
        VisionPart,
    )
    from model_providers.shape import TransformerShape
    from model_providers.transformer import ChunkedStage, LanguageModel
    from model_providers.weight_map import WeightMap


class MediaSpec(Protocol):
    """How a model family turns videos and images into patches and tokens; pure arithmetic, no weights."""

    @property
    def placeholder_ids(self) -> Mapping[MediaKind, int]:
        """The one token that the chat template writes for a medium: "video" and "image", as far as they are taken."""

    @property
    def patch_size(self) -> int: ...

    @property
    def temporal_patch_size(self) -> int: ...

    @property
    def frame_family(self) -> Literal["stride", "linspace"]:
        """How the Hugging Face processor of the family counts frames (data/video/frames.py)."""

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which frames are resized: multiples of patch_size. Raises ValueError for a picture that
        cannot be."""

    def tokens_per_unit(self, size_hw: tuple[int, int]) -> int:
        """Language tokens of one temporal patch."""

    def placeholder(self, item: MediaItem, sound: MediaItem | None = None) -> Placeholder:
        """What replaces the item's placeholder in the chat template; with `sound`, that of the same file as well."""


class AudioSpec(Protocol):
    """How a model family turns sound into columns of a spectrogram and tokens."""

    @property
    def placeholder_id(self) -> int: ...

    @property
    def rate(self) -> int:
        """Samples a second."""

    @property
    def num_mels(self) -> int: ...

    @property
    def frames_per_unit(self) -> int:
        """Columns of the spectrogram in one unit, which an encoder may encode apart."""

    @property
    def tokens_per_unit(self) -> int: ...

    @property
    def joins_video(self) -> bool:
        """Whether the sound of a video stands among the tokens of that video."""

    def num_frames(self, num_samples: int) -> int:
        """Columns of the spectrogram."""

    def num_tokens(self, num_frames: int) -> int: ...

    def placeholder(self, item: MediaItem) -> Placeholder:
        """What replaces the placeholder of a sound of its own."""

    def spectrogram(self, samples: NDArray[np.float32]) -> Tensor:
        """float32 [samples] of a whole item -> [F, num_mels]."""


@dataclass(frozen=True, slots=True)
class MediaSpecs:
    """What a checkpoint takes beside text. None: nothing of the kind."""

    pictures: MediaSpec | None = None
    sound: AudioSpec | None = None

    @property
    def placeholder_ids(self) -> dict[MediaKind, int]:
        """Of every kind that is taken."""
        found: dict[MediaKind, int] = dict(self.pictures.placeholder_ids) if self.pictures else {}
        return found | ({"audio": self.sound.placeholder_id} if self.sound else {})


class PositionRule(Protocol):
    """Rotary positions of a family."""

    def __call__(self, num_tokens: int, media: Sequence[MediaItem], spans: Sequence[Sequence[Run]]) -> Tensor:
        """int64 [3, num_tokens]; tokens of a response may follow the prompt's."""


class VideoDecoder(Protocol):
    """Reads frames by index. Raises VideoDecodeError(path, reason) for every fault of the file."""

    def probe(self, path: str) -> VideoInfo: ...

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        """uint8 RGB [F, 3, height, width]: exactly these frames (any order, repeats allowed), resized bicubic
        antialiased."""


class MediaEncoder(Protocol):
    """The encoders of a family, of vision and of sound, with their projectors. No unit of an item may attend to
    another, so that the units of an item can be encoded apart."""

    dtype: torch.dtype
    device: torch.device
    module: torch.nn.Module
    trained: frozenset[VisionPart]
    """Which parts take part in training."""
    version: int
    """Counts the changes of its weights."""
    is_original: bool
    """Whether its weights are those of the Hugging Face folder."""

    @property
    def width(self) -> int:
        """Columns of an embedding: H * (1 + DeepStack levels), the input embedding first."""

    @property
    def is_trained(self) -> bool: ...

    def named_weights(self) -> Mapping[str, torch.nn.Parameter]:
        """All parameters, trained or not, by Hugging Face name."""

    def fingerprint(self) -> str:
        """sha256 of all that decides what `encode` makes of given frames: weights, dtype, preprocessing."""

    def encode(self, frames: Tensor, kind: MediaKind = "video") -> Tensor:
        """Whole units of an item, uint8 [F, 3, height, width] or of sound float32 [F, mels] -> [n, width]."""

    def backward(self, frames: Tensor, grad: Tensor, kind: MediaKind = "video") -> None:
        """Encode again and add to the gradients of the parameters what `grad` [n, width] of the embeddings gives."""


class EmbeddingStore(Protocol):
    """Keeps embeddings between steps and runs, in entries of `units_per_entry` units."""

    units_per_entry: int

    def identify(self, media: Sequence[MediaItem]) -> None:
        """Called with every item before it is read or written. Collective."""

    def holds(self, item: MediaItem, start: int, stop: int) -> bool:
        """Whether `read` will find something, unless it is damaged or removed meanwhile."""

    def read(self, item: MediaItem, start: int, stop: int) -> tuple[Tensor | None, int]:
        """Embeddings [n, width] of the units [start, stop), or None where they are not all there; and the number of
        entries that turned out to be damaged."""

    def write(self, item: MediaItem, start: int, stop: int, embeds: Tensor) -> None:
        """Keep the embeddings [n, width] of units [start, stop)."""

    def trim(self) -> None:
        """Called after the writes of a step. Collective."""


class StepEncoder(Protocol):
    """The embeddings of the media of one step: made once by all ranks together, fetched by who needs them. All methods
    but `close` and `take_counts` are collective."""

    def forget(self) -> None:
        """Drop all embeddings: the step they were made for is over."""

    def prefetch(self, media: Sequence[MediaItem]) -> None:
        """Begin to read the media of a batch to come, instead of any before."""

    def encode(self, media: Sequence[MediaItem]) -> dict[str, str]:
        """Encode what is not there yet. Returns {key: reason} of those items that cannot be used."""

    def fetch(self, media: Sequence[MediaItem]) -> EncodedMedia:
        """The whole items that this rank asks for, in host memory."""

    def fetch_tokens(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> MediaEmbeds:
        """The runs of tokens [start, stop) that this rank asks for, by item; with gradients where these are wanted."""

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        """`embeds` itself or, if the encoder has changed since, the same tokens of the encoder as it is."""

    def backward(self, embeds: MediaEmbeds) -> None:
        """Take the gradients of `embeds` through the encoder."""

    def release(self) -> None:
        """No rank will fetch any more in this step."""

    def blanked(self) -> StepEncoder:
        """Another one over the same encoder, whose input is black frames and silence."""

    def take_counts(self) -> EncoderCounts | None:
        """What this rank did since the last call; None where the model has no encoder."""

    def close(self) -> None:
        """Nothing more will be encoded."""


class ModelProvider(Protocol):
    """Everything the system asks of a checkpoint's model family (model_providers/provider.py)."""

    shape: TransformerShape
    weight_map: WeightMap
    specs: MediaSpecs
    engine: EngineModel
    """How vLLM opens it; its folder is that of the files."""
    position_ids: PositionRule

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        """Tokens that a sampled response must not contain: placeholders, behind which media would be looked for."""

    def build_language(
        self, backend: Backend, mesh: ParallelMesh, temperature: float = 1.0, recompute: str = "none"
    ) -> LanguageModel | ChunkedStage:
        """This rank's pipeline stage, uninitialised."""

    def load_language(self, model: LanguageModel | ChunkedStage, mesh: ParallelMesh) -> None:
        """Fill a stage with its part of the Hugging Face weights."""

    def build_encoder(
        self, backend: Backend, device: torch.device, trained: frozenset[VisionPart] = frozenset()
    ) -> MediaEncoder | None:
        """What encodes media, weights loaded; only the parts in `trained` take part in training. None for a model that
        takes text only."""


class RolloutEngine(Protocol):
    """Holds the language model only: media arrive as embeddings."""

    def parameters(self) -> Mapping[str, Tensor]:
        """The engine's own parameters on this rank, by its names, each of the shape of its shard. To be written in
        place."""

    @property
    def version(self) -> int | None:
        """Of the weights it holds; None while there are none, or half of them."""

    def begin_update(self) -> None:
        """Its parameters are about to be written; until `weights_changed` it refuses to generate."""

    def weights_changed(self, version: int) -> None:
        """The parameters now hold the weights of `version`; what its caches computed with others is dropped."""

    def generate(self, prompts: Sequence[Prompt], media: EncodedMedia, sampling: Sampling) -> list[Completion]:
        """`sampling.num_samples` completions of each prompt, in order of (prompt, sample)."""

    def sleep(self) -> None:
        """Give its device memory back until `wake`."""

    def close(self) -> None:
        """Free what it holds. Nothing may be asked of it afterwards."""

    def wake(self, what: str) -> None:
        """`what`: "weights" before a sync, "kv_cache" before generation."""


class PartsFunction(Protocol):
    """Grades one batch, part by part; rewards/terms.py makes a RewardFunction of it."""

    @property
    def name(self) -> str: ...

    @property
    def terms(self) -> Mapping[str, float]:
        """Every part it may return, with its weight in the overall reward where a recipe gives none."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        """One dict of named parts per completion, without "overall"."""


class RewardFunction(Protocol):
    """Scores one batch. An unparsable answer scores 0.0; an exception is a bug and propagates.

    `completion.truncated` tells that a response was cut off at the length limit; `prompt.row.answer` is the text of the
    file, of which rewards/grading.py takes the reference out.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Sequence[Mapping[str, float | str]]:
        """One dict per completion: "overall" is the reward, every other number a part of it, every text a note for the
        log. Completions of one batch may have different parts."""


class AdvantageEstimator(Protocol):
    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """Advantages of every token of the global batch; the same on every rank."""


class PolicyLoss(Protocol):
    def __call__(self, inputs: LossInputs) -> LossOutput: ...


class Correction(Protocol):
    """Makes up for the difference between the trainer's and the engine's probabilities of the sampled tokens."""

    def __call__(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Corrected:
        """fp32 [R] each: what the trainer and what the engine says of the tokens, at the weights that sampled."""


class Learner(Protocol):
    """Makes optimizer updates from groups of scored responses. Every method is collective."""

    @property
    def version(self) -> int:
        """Counts the optimizer updates; the weights of a version are what a weight sync brings to the engine."""

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Learn from the groups of one step. Returns the metrics of all ranks together."""

    def offloaded(self) -> AbstractContextManager[None]:
        """Gradients and optimizer state leave the device for the length of the block: the engine needs the room."""


class WeightSync(Protocol):
    """Brings the learner's weights into the engine's parameters."""

    def sync(self, version: int, verify: bool = False) -> SyncReport:
        """Write the weights of `version`. `verify` compares checksums afterwards. Collective."""


class GroupSource(Protocol):
    """Where the groups of a step come from: the engine beside the trainer, or the rollouts of an earlier run."""

    def next_batch(self, step: int) -> RolloutBatch:
        """The groups of step `step` (from 0). Collective; all ranks get all groups."""
