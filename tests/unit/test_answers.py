# SPDX-License-Identifier: Apache-2.0
"""Which reference answers are learned, and as which tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tokenizers import AddedToken

from data.rows.answers import AnswerEncoder
from data.rows.loader import RowLoader
from megatron_rl.media.prompt_prefetcher import PromptPrefetcher
from megatron_rl.observe.progress import Progress
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.answers import AnswerSource
from megatron_rl.types import Prompt, Row
from tests.fakes import FakeEncoder

EOS = 0
MESH = ParallelMesh(0, Grid(1), Grid(1))


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Builder:
    def build(self, prompt_id: int, row: Row) -> Prompt:
        return Prompt(prompt_id, row, (1, 2))


class FakeTokenizer:
    """A token a character."""

    eos_token_id = EOS
    added_tokens_decoder = {
        number: AddedToken(token, special=special)
        for number, (token, special) in enumerate({"<|im_end|>": True, "<|pad|>": True, "<b>": False}.items())
    }

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]


def source(folder: Path, answers: list[str]) -> AnswerSource:
    rows = [Row(f"rows:{number}", "?", answer) for number, answer in enumerate(answers)]
    encoder, quarantine = FakeEncoder([]), Quarantine(folder, writes=True, max_fraction=0.5)
    return AnswerSource(
        RowLoader([rows], len(rows), seed=1, shuffle=False),
        PromptPrefetcher(Builder(), MESH, encoder, quarantine),
        encoder,
        quarantine,
        Progress(1, enabled=False),
        1,
        AnswerEncoder(FakeTokenizer(), 12),
    )


def test_answers_end_with_the_turn_and_control_tokens_are_no_text(tmp_path: Path) -> None:
    answers = ["yes", "<|pad|>", "no<|im_end|>", "x" * 12, "x" * 11, "<b>"]
    learned = source(tmp_path, answers).next_batch(0)
    assert ["".join(map(chr, sample.response_ids[:-1])) for sample in learned] == ["yes", "x" * 11, "<b>"]
    assert {sample.response_ids[-1] for sample in learned} == {EOS}
    bad = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in bad] == [
        "the answer contains <|pad|>, a control token of the model",
        "the answer contains <|im_end|>, a control token of the model",
        "answer of 13 tokens is over train.max_answer_tokens=12",
    ]


def test_a_batch_of_long_answers_names_their_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train\.max_answer_tokens: none of the 2 rows .* is left, 2 are too long"):
        source(tmp_path, ["x" * 12, "y" * 20]).next_batch(0)
