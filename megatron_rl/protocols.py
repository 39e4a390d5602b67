# SPDX-License-Identifier: Apache-2.0
"""Every seam of the system on one page. A Protocol is here only if two implementations (one may be a test's fake) exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rl.types import Completion, LossInputs, LossOutput, Prompt, Sampling, VideoArtifact, VideoInfo


class VideoSpec(Protocol):
    """How a model family turns a video into patches and tokens; pure arithmetic, no weights."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which frames are resized: multiples of patch_size * merge_size."""

    def placeholder(self, num_tokens: int) -> tuple[int, ...]:
        """Token ids that replace the single video placeholder of the chat template."""


class VideoDecoder(Protocol):
    """Reads frames by index. Raises VideoDecodeError(path, reason) for every fault of the file."""

    def probe(self, path: str) -> VideoInfo: ...

    def decode(self, path: str, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Tensor:
        """uint8 RGB [F, 3, H, W]: exactly these frames (any order, repeats allowed), resized bicubic antialiased."""


class RolloutEngine(Protocol):
    """Holds the language model only: video arrives as embeddings."""

    def parameters(self) -> Mapping[str, Tensor]: ...

    def weights_changed(self, version: int) -> None: ...

    def generate(
        self, prompts: Sequence[Prompt], embeds: Mapping[str, Tensor], sampling: Sampling
    ) -> list[Completion]: ...

    def sleep(self) -> None: ...

    def wake(self, what: str) -> None:
        """`what`: "weights" before a sync, "kv_cache" before generation."""


class RewardFunction(Protocol):
    """Scores one batch. An unparsable answer scores 0.0; an exception is a bug and propagates."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        """One dict of named parts per completion; the key "overall" is the reward."""


class AdvantageEstimator(Protocol):
    def __call__(self, rewards: Sequence[float]) -> list[float]:
        """Advantages of one group, same length as its rewards."""


class PolicyLoss(Protocol):
    def __call__(self, inputs: LossInputs) -> LossOutput: ...


class EmbedSource(Protocol):
    """Where video embeddings come from: encoded once a step, fetched by whoever needs them."""

    def fetch(self, videos: Sequence[VideoArtifact]) -> dict[str, Tensor]:
        """Collective over the world: {artifact.key: [num_tokens, H]} for the videos this rank asks for."""


class WeightsSwap(Protocol):
    """Gives the model other weights for the length of a `with` block (the reference policy)."""

    def swapped_in(self) -> AbstractContextManager[None]: ...
