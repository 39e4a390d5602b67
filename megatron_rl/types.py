# SPDX-License-Identifier: Apache-2.0
"""The arrows of the data flow: one frozen dataclass per stage, in the order in which a step makes them.

Shape suffixes used in the whole project:
T packed tokens of one micro-batch, R response tokens in it, F frames, P prompts, N samples a prompt, V vocabulary,
H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


FORBIDDEN_BIAS = -100.0
"""Added to the logits of tokens that must not be sampled, by trainer and engine; vLLM clamps biases to it."""


DECODED_BYTES = 64 << 20
"""Of resized frames that are decoded together and go into the vision tower one piece after the other."""

VisionPart = Literal["tower", "projector"]


@dataclass(frozen=True, slots=True)
class Row:
    """One checked line of a data file. `source` is "file.jsonl:12"; paths are absolute.

    `span` (start, end) is the range of seconds of its videos and sounds that is looked at.
    """

    source: str
    problem: str
    answer: str
    videos: tuple[str, ...] = ()
    problem_type: str = ""
    images: tuple[str, ...] = ()
    span: tuple[float, float] = (0.0, math.inf)
    audios: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside, and why: its own fault, its media's, or its length. Counted, listed in
    `<run>/quarantine.jsonl`, never replaced."""

    source: str
    reason: str
    kind: Literal["row", "media", "overlong"] = "row"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What one demux pass tells about a file. `timestamps[i]` is the presentation time of frame i in seconds, first
    frame 0. `width` and `height` are those of the picture as shown, rotation applied. `average_fps` is what the header
    says; 0 where it says nothing."""

    path: str
    codec: str
    width: int
    height: int
    timestamps: tuple[float, ...]
    average_fps: float = 0.0

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def rate(self) -> float:
        """Frames a second, by the header or else by the timestamps; 1 for a single frame."""
        if self.average_fps > 0:
            return self.average_fps
        return (self.num_frames - 1) / self.timestamps[-1] if self.timestamps[-1] > 0 else 1.0


@dataclass(frozen=True, slots=True)
class MediaItem:
    """Which frames of a video, at which size, making which tokens: decided once, used by vLLM and by the trainer.

    `key` is the sha256 of everything else, file identity included. `grid_thw` counts patches after the temporal merge:
    a video gives t*h*w patches and `num_tokens` = t*h*w / merge_size**2 language tokens. An image is a video of one
    temporal patch whose frames are all that picture, with placeholders of its own.
    """

    key: str
    path: str
    frame_indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    size_hw: tuple[int, int]
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    num_tokens: int
    is_image: bool = False


@dataclass(frozen=True, slots=True)
class MediaEmbeds:
    """Embeddings of the video tokens that a rank asked for: `tables[key]` [n, H] holds the tokens of `wanted[key]`, its
    runs [start, stop) one behind the other. `version` is that of the tower that made them."""

    tables: Mapping[str, Tensor]
    wanted: Mapping[str, tuple[tuple[int, int], ...]]
    version: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized question. `token_ids` holds every placeholder token of every video and image (already
    expanded); `videos` are both kinds in the order of their tokens."""

    prompt_id: int
    row: Row
    token_ids: tuple[int, ...]
    videos: tuple[MediaItem, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a rollout phase samples. `seed` is the base from which one seed per (step, prompt, sample) is derived."""

    num_samples: int
    temperature: float
    max_response_tokens: int
    seed: int
    step: int = 0
    greedy: bool = False
    weights_version: int | None = None
    """Weights that the engine must hold; it refuses to sample with others. None = whichever it holds."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response. `logprobs[i]` is the engine's log-probability of `token_ids[i]` at the sampling
    temperature."""

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its reward. `parts` are the named components (accuracy, format ...); `reward` their
    weighted sum."""

    completion: Completion
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its scored responses: what an advantage is measured within."""

    prompt: Prompt
    scored: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one step: all that were sampled, and those to learn from. `sync` tells of the weight sync before
    them, None where the engine held the newest weights or there was no engine."""

    sampled: tuple[Group, ...]
    kept: tuple[Group, ...]
    sync: SyncReport | None = None


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence to learn from. `place` = (group, response) in the global batch, by which its advantages are found;
    `weight` scales its loss."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    place: tuple[int, int] = (0, 0)
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """All responses of the global batch, on every rank: `rewards[p][i]` is that of response i to prompt p,
    `num_tokens[p][i]` its length. Responses that are left out of the loss are in it: they belong to the baseline."""

    rewards: tuple[tuple[float, ...], ...]
    num_tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Advantages:
    """`tokens[p][i]`: fp32 [num_tokens of response i to prompt p]."""

    tokens: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything a policy loss sees, per response token of one micro-batch, all fp32 [R]."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss_sum` is a sum over tokens (the global token count divides it later); metrics are (numerator,
    denominator)."""

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction for the mismatch of trainer and engine says of each response token, fp32 [R] and bool [R]:
    the factor of its loss, and whether it stays in the loss at all."""

    weight: Tensor
    keep: Tensor


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Bytes of one weight sync on this rank; `minimum` = bytes it needed and did not already hold."""

    version: int
    received: int
    sent: int
    minimum: int
    copied_locally: int
    seconds: float
