# SPDX-License-Identifier: Apache-2.0
"""Every seam of the system on one page. A Protocol is here only if two implementations (one may be a test's fake)
exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_rl.media.encoder import EncoderCounts
    from megatron_rl.runtime.device import Backend
    from megatron_rl.runtime.parallel import ParallelMesh
    from megatron_rl.types import (
        AdvantageInputs,
        Advantages,
        Completion,
        Corrected,
        Group,
        LossInputs,
        LossOutput,
        MediaEmbeds,
        MediaItem,
        Prompt,
        RolloutBatch,
        Sampling,
        SyncReport,
        VideoInfo,
        VisionPart,
    )
    from model_providers.shape import TransformerShape
    from model_providers.transformer import ChunkedStage, LanguageModel
    from model_providers.weight_map import WeightMap


class MediaSpec(Protocol):
    """How a model family turns a video into patches and tokens; pure arithmetic, no weights."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    frame_family: Literal["stride", "linspace"]
    """How the Hugging Face processor of the family counts frames (data/video/frames.py)."""

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which frames are resized: multiples of patch_size * merge_size."""

    def placeholder(self, num_tokens: int, is_image: bool = False) -> tuple[int, ...]:
        """Token ids that replace the single placeholder of a video or an image in the chat template."""


class VideoDecoder(Protocol):
    """Reads frames by index. Raises VideoDecodeError(path, reason) for every fault of the file."""

    def probe(self, path: str) -> VideoInfo: ...

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        """uint8 RGB [F, 3, H, W]: exactly these frames (any order, repeats allowed), resized bicubic antialiased."""


class MediaEncoder(Protocol):
    """The vision tower and projector of a family. No temporal patch may look at another, so that a video can be cut
    between any two of them."""

    spec: MediaSpec
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
    def is_trained(self) -> bool: ...

    def named_weights(self) -> Mapping[str, torch.nn.Parameter]:
        """All parameters, trained or not, by Hugging Face name."""

    def fingerprint(self) -> str:
        """sha256 of all that decides what `encode` makes of given frames: weights, dtype, preprocessing."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [F, 3, height, width], F a multiple of the temporal patch -> embeddings [num_tokens, H]."""

    def backward(self, frames: Tensor, grad: Tensor) -> None:
        """Encode the frames again and add what `grad` [num_tokens, H] of their embeddings means for the parameters."""


class EmbeddingStore(Protocol):
    """Keeps embeddings between steps and runs, in entries of `patches_per_entry` temporal patches."""

    patches_per_entry: int

    def identify(self, videos: Sequence[MediaItem]) -> None:
        """Called with every video before it is read or written. Collective."""

    def holds(self, video: MediaItem, start: int, stop: int) -> bool:
        """Whether `read` will find something, unless it is damaged or removed meanwhile."""

    def read(self, video: MediaItem, start: int, stop: int) -> tuple[Tensor | None, int]:
        """Embeddings of the temporal patches [start, stop), or None where they are not all there; and the number of
        entries that turned out to be damaged."""

    def write(self, video: MediaItem, start: int, embeds: Tensor) -> None:
        """Keep embeddings of temporal patches start, start + 1 ..."""

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

    def fetch(self, media: Sequence[MediaItem]) -> dict[str, Tensor]:
        """{key: [num_tokens, width]} of the items that this rank asks for, in host memory."""

    def fetch_tokens(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> MediaEmbeds:
        """The runs of tokens [start, stop) that this rank asks for, by item; with gradients where these are wanted."""

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        """`embeds` itself or, if the encoder has changed since, the same tokens of the encoder as it is."""

    def backward(self, embeds: MediaEmbeds) -> None:
        """Take the gradients of `embeds` through the encoder."""

    def release(self) -> None:
        """Nobody will fetch any more in this step."""

    def blanked(self) -> StepEncoder:
        """Another one over the same encoder, which sees nothing: black frames, silence."""

    def take_counts(self) -> EncoderCounts:
        """What this rank did since the last call."""

    def close(self) -> None:
        """Nothing more will be encoded."""


class ModelProvider(Protocol):
    """Everything the system asks of a model family; one per package in model_providers/, opened by its registry."""

    shape: TransformerShape
    weight_map: WeightMap
    video_spec: MediaSpec | None
    """None, like the three below, for a family that takes no video: rows with one are refused."""
    video_token_id: int | None
    image_token_id: int | None

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        """Tokens that a sampled response must not contain."""

    def build_language(
        self, backend: Backend, mesh: ParallelMesh, temperature: float = 1.0, recompute: str = "none"
    ) -> LanguageModel | ChunkedStage:
        """This rank's pipeline stage, uninitialised."""

    def load_language(self, model: LanguageModel | ChunkedStage, mesh: ParallelMesh) -> None:
        """Fill a stage with its part of the Hugging Face weights."""

    def build_vision(
        self, backend: Backend, device: torch.device, trained: frozenset[VisionPart] = frozenset()
    ) -> MediaEncoder | None:
        """The tower with its projector, weights loaded; only the parts in `trained` take part in training."""

    def position_ids(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> Tensor:
        """int64 [3, len(token_ids)]."""

    def video_starts(self, token_ids: Sequence[int], videos: Sequence[MediaItem]) -> list[int]:
        """Index of the first placeholder token of each video."""

    def engine_prompt(self, prompt: Prompt, embeds: Mapping[str, Tensor]) -> dict[str, Any]:
        """The engine's own input format."""


class RolloutEngine(Protocol):
    """Holds the language model only: video arrives as embeddings."""

    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def version(self) -> int | None:
        """Of the weights it holds; None while there are none, or half of them."""

    def begin_update(self) -> None:
        """Its parameters are about to be written; until `weights_changed` it refuses to generate."""

    def weights_changed(self, version: int) -> None:
        """The parameters now hold the weights of `version`; what its caches computed with others is dropped."""

    def generate(
        self, prompts: Sequence[Prompt], embeds: Mapping[str, Tensor], sampling: Sampling
    ) -> list[Completion]: ...

    def sleep(self) -> None: ...

    def close(self) -> None:
        """Free what it holds. Nothing may be asked of it afterwards."""

    def wake(self, what: str) -> None:
        """`what`: "weights" before a sync, "kv_cache" before generation."""


class RewardFunction(Protocol):
    """Scores one batch. An unparsable answer scores 0.0; an exception is a bug and propagates."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        """One dict of named parts per completion; the key "overall" is the reward."""


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
