# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the seams of a step, without weights: what they were asked is recorded in one list of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.media.encoder import EncoderCounts
from megatron_rl.types import Completion, EncodedMedia, Group, MediaEmbeds, MediaItem, Prompt, Sampling, SyncReport


@dataclass
class FakeEngine:
    """Protocol RolloutEngine. Sample i of a prompt answers `answers(prompt)[i]`."""

    events: list[str]
    answers: Callable[[Prompt], Sequence[str]]
    version: int | None = None

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def begin_update(self) -> None:
        self.version = None

    def weights_changed(self, version: int) -> None:
        self.version = version

    def generate(self, prompts: Sequence[Prompt], media: EncodedMedia, sampling: Sampling) -> list[Completion]:
        assert self.version == sampling.weights_version, "sampled with other weights than the learner's"
        assert all(item.key in media.tables for prompt in prompts for item in prompt.media)
        self.events.append(f"generate {len(prompts)}")
        return [
            Completion(p.prompt_id, i, (7,) * len(text), (-1.0,) * len(text), text, truncated=False)
            for p in prompts
            for i, text in enumerate(self.answers(p)[: sampling.num_samples])
        ]

    def sleep(self) -> None:
        self.events.append("sleep")

    def wake(self, what: str) -> None:
        self.events.append(f"wake {what}")

    def close(self) -> None:
        self.events.append("close")


@dataclass
class FakeLearner:
    """Protocol Learner. Each batch is one update."""

    events: list[str]
    version: int = 0
    learned: list[Sequence[Group]] = field(default_factory=list)

    def learn(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        self.events.append(f"learn {len(groups)}")
        self.learned.append(groups)
        self.version += 1
        return {"actor/num_groups": float(len(groups))}

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        self.events.append("offload")
        try:
            yield
        finally:
            self.events.append("restore")


@dataclass
class FakeWeightSync:
    """Protocol WeightSync. `fails` lets it raise."""

    events: list[str]
    fails: bool = False

    def sync(self, version: int, verify: bool = False) -> SyncReport:
        self.events.append(f"sync {version}")
        if self.fails:
            raise RuntimeError("the link is down")
        return SyncReport(version, received=8, sent=8, minimum=8, copied_locally=0, seconds=0.0)


@dataclass
class FakeEncoder:
    """Protocol StepEncoder: a token of an item is its number. Items whose path is in `broken` cannot be used."""

    events: list[str]
    broken: frozenset[str] = frozenset()
    made: set[str] = field(default_factory=set)
    counts: EncoderCounts = field(default_factory=EncoderCounts)

    def forget(self) -> None:
        self.made.clear()
        self.events.append("forget")

    def prefetch(self, media: Sequence[MediaItem]) -> None:
        self.events.append(f"prefetch {len(media)}")

    def encode(self, media: Sequence[MediaItem]) -> dict[str, str]:
        self.made |= {item.key for item in media if item.path not in self.broken}
        self.counts.encoded_patches += len(media)
        return {item.key: "cut off" for item in media if item.path in self.broken}

    def fetch(self, media: Sequence[MediaItem]) -> EncodedMedia:
        assert all(item.key in self.made for item in media)
        return EncodedMedia({item.key: torch.arange(item.num_tokens)[:, None].float() for item in media})

    def fetch_tokens(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> MediaEmbeds:
        rows = {key: torch.cat([torch.arange(*run) for run in runs])[:, None].float() for key, runs in wanted.items()}
        return MediaEmbeds(rows, {key: tuple(runs) for key, runs in wanted.items()}, 0)

    def refreshed(self, embeds: MediaEmbeds) -> MediaEmbeds:
        return embeds

    def backward(self, embeds: MediaEmbeds) -> None:
        self.events.append("backward")

    def release(self) -> None:
        self.made.clear()

    def blanked(self) -> FakeEncoder:
        return FakeEncoder(self.events, self.broken)

    def take_counts(self) -> EncoderCounts:
        counts, self.counts = self.counts, EncoderCounts()
        return counts

    def close(self) -> None:
        self.events.append("close encoder")
