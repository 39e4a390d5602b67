# SPDX-License-Identifier: Apache-2.0
"""The arrows of the data flow: one frozen dataclass per stage, in the order in which a step makes them.

Shapes, in the whole project:
    T   rows (tokens) of a micro-batch on one rank, padding included; T/tp of them under sequence parallelism
    R   response tokens predicted there
    K   rows that predict them, K' with padding
    n   tokens of media
    S   key rows of one block of attention
    A   attention heads; G key/value heads (Megatron's query groups); D columns of a head
    H   hidden size
    V   vocabulary
    F   frames: pictures of a video, columns of the spectrogram of a sound
    P   tokens of a prompt; N responses to it
    width = H * (1 + DeepStack levels): columns of the embeddings of media
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.runtime.compress import integers_from_bytes, integers_to_bytes, times_from_bytes, times_to_bytes

if TYPE_CHECKING:
    from torch import Tensor


FORBIDDEN_BIAS = -100.0
"""Added to the logits of tokens that must not be sampled, by trainer and engine; vLLM clamps biases to it."""

DECODED_BYTES = 64 << 20
"""Bytes of resized frames that are decoded together; they go into the encoder chunk by chunk."""

VisionPart = Literal["tower", "projector"]
MediaKind = Literal["video", "image", "audio"]
Run = tuple[int, int]  # [start, stop) of tokens
Turn = tuple[Literal["user", "assistant"], str]  # who speaks, and the text


@dataclass(frozen=True, slots=True)
class Row:
    """One checked line of a data file. `source` is "file.jsonl:12"; paths are absolute.
    Example: Row("train.jsonl:12", "<video>Which colour?", "B", videos=("/data/a.mp4",))

    `span` (start, end) is the range of seconds of its videos and sounds that is looked at; `video_spans`, empty or one
    for each video, takes its place where videos have spans of their own. `problem` is the last turn of the user;
    `system` and `history` stand before it.
    """

    source: str
    problem: str
    answer: str
    videos: tuple[str, ...] = ()
    problem_type: str = ""
    images: tuple[str, ...] = ()
    span: tuple[float, float] = (0.0, math.inf)
    audios: tuple[str, ...] = ()
    system: str = ""
    history: tuple[Turn, ...] = ()
    video_spans: tuple[tuple[float, float], ...] = ()

    def span_of(self, video: int) -> tuple[float, float]:
        """The seconds of video number `video` that are looked at."""
        return self.video_spans[video] if self.video_spans else self.span


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside, and why: its own fault, its media's, or its length. Counted, listed in
    `<run>/quarantine.jsonl`, never replaced.
    Example: BadRow("train.jsonl:7", "/data/b.mp4: no video stream", "media")"""

    source: str
    reason: str
    kind: Literal["row", "media", "overlong"] = "row"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What one demux pass tells about a file. `timestamps[i]` is the presentation time of frame i in seconds, first
    frame 0. `width` and `height` are those of the picture as shown, rotation applied. `average_fps` is what the header
    says; 0 where it says nothing.
    Example: VideoInfo("a.mp4", "h264", 640, 360, (0.0, 0.04, 0.08), 25.0)"""

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
    """What is taken from a file, and how many tokens it makes: decided once, used by vLLM and by the trainer.

    key: sha256 of everything else, file identity included
    frame_indices, timestamps: which pictures, and their seconds; an image is a video of one temporal patch whose frames
        are all that picture. Empty for sound.
    size_hw: to which pictures are resized; of sound, (1, mel bins)
    grid_thw: patches after the temporal merge; of sound, (units, 1, 1)
    seconds_per_grid: between two steps of grid_thw[0]
    span: (start, end) seconds of the file that sound is taken from
    num_frames: pictures, or columns of the spectrogram
    An encoder may encode units apart: unit i is frames [i * frames_per_unit, ...) and makes tokens
    [i * tokens_per_unit, ...); the last unit may be shorter.
    Example: MediaItem("3fa4", "a.mp4", (0, 10, 20, 30), (0.0, 0.4, 0.8, 1.2), (56, 84), (2, 4, 6), 0.8, 12, 4, 2, 6)
    """

    key: str
    path: str
    frame_indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    size_hw: tuple[int, int]
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    num_tokens: int
    num_frames: int
    frames_per_unit: int
    tokens_per_unit: int
    kind: MediaKind = "video"
    span: tuple[float, float] = (0.0, math.inf)

    @property
    def num_units(self) -> int:
        """Parts that an encoder may encode apart; each makes at least one token."""
        return -(-self.num_tokens // self.tokens_per_unit)

    def tokens_of(self, start: int, stop: int) -> Run:
        """The tokens that units [start, stop) make."""
        return start * self.tokens_per_unit, min(stop * self.tokens_per_unit, self.num_tokens)

    def frames_of(self, start: int, stop: int) -> Run:
        """The frames that units [start, stop) are made from; the last unit has all that are left."""
        last = self.num_frames if stop >= self.num_units else stop * self.frames_per_unit
        return start * self.frames_per_unit, last

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the length of its tuples."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        times = times_to_bytes(values.pop("timestamps"))
        return _item_from_bytes, (values | {"frame_indices": integers_to_bytes(self.frame_indices)}, times)


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The tokens of one medium, or of a video and its sound: `spans[i]` are the runs that the tokens of item i fill,
    ascending; ordinary tokens stand between them.
    Example: Placeholder((9, 9, 198, 9, 9), (((0, 2), (3, 5)),)), four tokens of one item around a newline"""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """Whole items as the engine takes them: `tables[key]` [n, width] in host memory, n the tokens of the item.
    `made_by` tells encoders, their versions and what they were shown apart: equal names, equal rows of an item.
    Example: EncodedMedia({"3fa4": torch.zeros(12, 128)}, "0")"""

    tables: Mapping[str, Tensor]
    made_by: str = ""


@dataclass(frozen=True, slots=True)
class MediaEmbeds:
    """Embeddings of the media tokens that a rank asked for: `tables[key]` [n, width] holds the tokens of `wanted[key]`,
    its runs [start, stop) one behind the other. `version` is that of the encoder that made them.
    Example: MediaEmbeds({"3fa4": torch.zeros(8, 128)}, {"3fa4": ((0, 6), (10, 12))}, 0)"""

    tables: Mapping[str, Tensor]
    wanted: Mapping[str, tuple[Run, ...]]
    version: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized question. `token_ids` holds every placeholder token of every medium (already expanded).

    `spans[i]`: the runs [start, stop) of `token_ids` that the tokens of `media[i]` fill, ascending. Ordinary tokens
    (timestamps, newlines) and runs of another item may stand between them. `media` is in the order of first tokens.
    Example: Prompt(0, row, (1, 9, 9, 9, 2), (item,), (((1, 4),),)), `item` of three tokens
    """

    prompt_id: int
    row: Row
    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...] = ()
    spans: tuple[tuple[Run, ...], ...] = ()

    def __post_init__(self) -> None:
        filled = [sum(stop - start for start, stop in runs) for runs in self.spans]
        assert filled == [item.num_tokens for item in self.media], f"{self.row.source}: spans {filled} do not fit media"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled in a few KB, however long."""
        ids, spans = integers_to_bytes(self.token_ids), [integers_to_bytes(sum(runs, ())) for runs in self.spans]
        return _prompt_from_bytes, (self.prompt_id, self.row, ids, self.media, spans)


def _item_from_bytes(values: dict[str, Any], times: tuple[int, bytes, bytes]) -> MediaItem:
    indices = integers_from_bytes(values["frame_indices"])
    return MediaItem(**values | {"frame_indices": indices, "timestamps": times_from_bytes(*times)})


def _prompt_from_bytes(
    prompt_id: int, row: Row, token_ids: bytes, media: tuple[MediaItem, ...], spans: Sequence[bytes]
) -> Prompt:
    edges = [integers_from_bytes(data) for data in spans]
    runs = tuple(tuple(zip(e[::2], e[1::2], strict=True)) for e in edges)
    return Prompt(prompt_id, row, integers_from_bytes(token_ids), media, runs)


@dataclass(frozen=True, slots=True)
class EngineModel:
    """How vLLM opens a family. `folder`: of the model in the checkpoint's folder, empty where it is the same.

    architecture: vLLM's class, None where config.json names it; overrides: entries of config.json to replace
    positions: "mrope" where a token has three positions, "plain" where they count up
    deepstack_levels: how many layers take features of the encoder beside the input embeddings
    Example: EngineModel("models/Qwen2.5-VL-7B-Instruct", positions="mrope")
    """

    folder: str = ""
    architecture: str | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    positions: Literal["mrope", "plain"] = "plain"
    deepstack_levels: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a rollout phase samples. `seed` is the base from which one seed per (step, prompt, sample) is derived.
    Example: Sampling(num_samples=8, temperature=1.0, max_response_tokens=512, seed=1, step=3, weights_version=3)"""

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
    temperature. `truncated`: it ended at the length limit.
    Example: Completion(0, 2, (33, 151645), (-0.7, -0.1), "B", truncated=False)"""

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its reward. `parts` are the named components (accuracy, format ...); `reward` their
    weighted sum; `notes` what the reward has to say in words, for the log.
    Example: Scored(completion, 0.9, {"overall": 0.9, "accuracy": 1.0, "format": 0.0}, {"reason": "no reasoning"})"""

    completion: Completion
    reward: float
    parts: dict[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its scored responses: what an advantage is measured within.
    Example: Group(prompt, (scored, scored)), two responses to one prompt"""

    prompt: Prompt
    scored: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one step: all that were sampled, and those to learn from. `sync` tells of the weight sync before
    them, None where the engine held the newest weights or there was no engine.
    Example: RolloutBatch(sampled=(solved_by_all, solved_by_some), kept=(solved_by_some,))"""

    sampled: tuple[Group, ...]
    kept: tuple[Group, ...]
    sync: SyncReport | None = None


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence to learn from. `place` = (group, response) in the global batch, by which its advantages are found;
    `weight` scales its loss.
    Example: TrainSample(prompt, (33, 151645), (-0.7, -0.1), place=(0, 2))"""

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
    `num_tokens[p][i]` its length. Responses that are left out of the loss are in it: they belong to the baseline.
    Example: AdvantageInputs(rewards=((1.0, 0.0), (1.0, 1.0)), num_tokens=((2, 5), (3, 3)))"""

    rewards: tuple[tuple[float, ...], ...]
    num_tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Advantages:
    """`tokens[p][i]`: fp32 [num_tokens of response i to prompt p].
    Example: Advantages(((torch.full((2,), 0.7), torch.full((5,), -0.7)),))"""

    tokens: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything a policy loss sees, per response token of one micro-batch, all fp32 [R].
    Example: LossInputs(logp, logp.detach(), None, rollout_logp, advantages, weights=torch.ones(7)), R = 7"""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss_sum` [] is a sum over tokens (the global token count divides it later); metrics are (numerator [],
    denominator []).
    Example: LossOutput(loss.sum(), {"actor/ppo_kl": (kl.sum(), torch.tensor(7.0))})"""

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction for the mismatch of trainer and engine says of each response token, fp32 [R] and bool [R]:
    the factor of its loss, and whether it stays in the loss at all.
    Example: Corrected(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))"""

    weight: Tensor
    keep: Tensor


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Bytes of one weight sync on this rank; `minimum` = bytes it needed and did not already hold.
    Example: SyncReport(version=3, received=4096, sent=4096, minimum=4096, copied_locally=8192, seconds=0.02)"""

    version: int
    received: int
    sent: int
    minimum: int
    copied_locally: int
    seconds: float
