# SPDX-License-Identifier: Apache-2.0
"""Rows whose reference answer is to be learned, as samples."""

from __future__ import annotations

from collections.abc import Callable

from data.rows.loader import RowLoader
from megatron_rl.errors import BadSample
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.protocols import StepEncoder
from megatron_rl.types import BadRow, Prompt, Row, TrainSample

EncodeAnswer = Callable[[Row], tuple[int, ...]]


class AnswerSource:
    """The rows of a loader as samples whose response is the reference answer. Every method is collective.

    `encode` gives the tokens of an answer, its end-of-turn token included, or raises BadSample: an answer in which a
    control token is written would be learned as the token and not as its text.
    """

    def __init__(
        self,
        loader: RowLoader,
        prompts: PromptPrefetcher,
        encoder: StepEncoder,
        quarantine: Quarantine,
        progress: Progress,
        num_steps: int,
        encode: EncodeAnswer,
    ):
        self._loader, self._prompts, self._encoder, self._quarantine = loader, prompts, encoder, quarantine
        self._progress, self._num_steps = progress, num_steps
        self._encode = encode

    def next_batch(self, step: int) -> list[TrainSample]:
        """The next rows, their media encoded; answers that cannot be learned as they are, are set aside."""
        self._encoder.forget()
        with self._progress.phase(step, "encode"):
            prompts = self._prompts.encoded(self._loader.next_batch(), f"step {step}")
            if step + 1 < self._num_steps:
                self._prompts.prepare(self._loader.peek_batch())  # read while this batch is learned
        samples = [self._sample(prompt) for prompt in prompts]
        bad = [sample for sample in samples if isinstance(sample, BadRow)]
        self._quarantine.add(bad, len(prompts), "a batch of reference answers", "train.max_answer_tokens")
        return [sample for sample in samples if isinstance(sample, TrainSample)]

    def _sample(self, prompt: Prompt) -> TrainSample | BadRow:
        try:
            answer = self._encode(prompt.row)
        except BadSample as error:
            return BadRow(error.source, error.reason, error.kind)
        return TrainSample(prompt, answer, rollout_logprobs=(0.0,) * len(answer))
