# SPDX-License-Identifier: Apache-2.0
"""I3 for long sequences: shared prefixes and context parallelism, at every layout, change neither loss nor gradient.

The truth repeats the prompt for every response, one sample a micro-batch, on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.training.batch import pack
from megatron_rl.training.microbatch import MicroBatch
from model_providers import layer
from tests import tiny_policy as tp
from tests.world import run_world

TOLERANCE = 1e-5
ONE_BY_ONE = 148  # tokens of the longest sample
WHOLE = 400  # tokens, enough for any group
FEW_ROWS = 50  # of which the feed-forward network computes several lots a micro-batch, where nothing is kept of it
NUM_LAYERS = 2
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Case:
    """Sizes and switches of one run."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    comm: str = "all_gather"
    share: bool = True
    budget: int = WHOLE
    recompute: str = "none"
    frozen: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}_pp{self.pipeline}_cp{self.context}_dp{self.data}"
        switches = [self.comm, "share" if self.share else "repeat", str(self.budget), self.recompute]
        return "-".join([sizes, *switches, *(["frozen"] if self.frozen else [])])


@dataclass(frozen=True)
class Result:
    metrics: dict[str, tuple[float, float]]
    gradients: Any
    logprobs: dict[int, Tensor]
    num_rows: list[int]
    """Rows that passed each layer of this rank in the update."""


def _pack(trainer: tp.Trainer, case: Case) -> list[MicroBatch]:
    groups = tp.grouped_samples(trainer.provider)
    batches = pack(groups, 1, case.budget, trainer.provider, trainer.mesh, share_prefix=case.share)[0].batches
    return batches


def _measure(rank: int, folder: Path, case: Case) -> Result:
    layer.FEED_FORWARD_ROWS = FEW_ROWS
    mesh = tp.join(case.tensor, case.pipeline, context=case.context, comm=case.comm)
    trainer = tp.open_trainer(folder, mesh, tp.MEASURE, recompute=case.recompute, frozen=case.frozen)
    samples = [s for group in tp.grouped_samples(trainer.provider) for s in group]
    batches = _pack(trainer, case)
    embeds = tp.random_embeds(samples)
    logprobs: dict[int, Tensor] = {}
    for batch, values in zip(batches, trainer.policy.logprobs(batches, embeds), strict=True):
        if values is not None:
            _place(logprobs, batch, values, [len(s.response_ids) for s in samples])
    counts = _count_rows(trainer)
    metrics = trainer.policy.train(tp.off_policy(batches), embeds, PpoClip(kl_coef=0.1), step=0)
    return Result(metrics, tp.gradients(trainer), logprobs, list(counts.values()))


def _count_rows(trainer: tp.Trainer) -> dict[int, int]:
    """{layer: rows of its input so far}, counted from here on."""
    counts: dict[int, int] = {}

    def count(at: Any, args: Any, kwargs: Any) -> None:
        counts[at.layer_number] = counts.get(at.layer_number, 0) + len(kwargs["hidden_states"])

    for module in trainer.policy.language_model.decoder.layers:
        module.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def _place(logprobs: dict[int, Tensor], batch: MicroBatch, values: Tensor, lengths: Sequence[int]) -> None:
    """Put this rank's log-probabilities where they belong in each sample's response; the rest stays zero."""
    line = torch.zeros(sum(lengths[i] for i in batch.samples))
    line[batch.response_index] = values
    parts = line.split([lengths[i] for i in batch.samples])
    for index, part in zip(batch.samples, parts, strict=True):
        logprobs[index] = logprobs.get(index, 0) + part


def _run(folder: Path, case: Case) -> tuple[dict[str, float], dict[str, Tensor], dict[int, Tensor], int]:
    """(mean metrics, gradients by Hugging Face name, log-probabilities by sample, rows that pass all layers)."""
    ranks: list[Result] = run_world(case.world, _measure, folder, case)
    sums: dict[str, Tensor] = {}
    for rank in ranks:
        for name, pair in rank.metrics.items():
            sums[name] = sums.get(name, torch.zeros(2)) + torch.tensor(pair)
    logprobs: dict[int, Tensor] = {}
    for number, rank in enumerate(ranks):
        if number % case.tensor == 0:
            for index, part in rank.logprobs.items():
                logprobs[index] = logprobs.get(index, 0) + part
    means = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    gradients = tp.assemble(tp.open_provider(folder), [rank.gradients for rank in ranks])
    return means, gradients, logprobs, sum(sum(rank.num_rows) for rank in ranks)


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Path) -> Any:
    return _run(tiny_checkpoint, Case(share=False, budget=ONE_BY_ONE))


def _assert_same(folder: Path, case: Case, truth: Any) -> None:
    metrics, gradients, logprobs, num_rows = _run(folder, case)
    expected = dict(truth[1])
    if case.frozen:
        del expected["model.embed_tokens.weight"]
    errors = tp.relative_errors(gradients, expected)
    assert max(errors.values()) <= TOLERANCE, errors
    assert all(g.norm() > 0 for g in gradients.values())
    if not case.frozen:
        assert metrics == pytest.approx(truth[0], rel=TOLERANCE, abs=1e-6)
    assert logprobs.keys() == truth[2].keys()
    for index, values in logprobs.items():
        torch.testing.assert_close(values, truth[2][index], rtol=0, atol=2e-5)
    if case.recompute != "full":  # which passes every layer twice
        _check_rows(folder, case, num_rows)


def _check_rows(folder: Path, case: Case, num_rows: int) -> None:
    """A prompt passes each layer once for all of its responses: P + N R rows; repeated, N (P + R)."""
    groups = tp.grouped_samples(tp.open_provider(folder))
    shared = sum(len(g[0].prompt.token_ids) + sum(len(s.response_ids) for s in g) for g in groups)
    repeated = sum(s.num_tokens for g in groups for s in g)
    if case.share and case.budget < WHOLE:  # some group is divided over micro-batches
        assert shared < num_rows / NUM_LAYERS < repeated
        return
    padding = num_rows - NUM_LAYERS * (shared if case.share else repeated)
    assert 0 <= padding <= (case.tensor - 1) * case.context * NUM_LAYERS * len(groups)


LAYOUTS = [(t, p, c) for t in (1, 2) for p in (1, 2) for c in (1, 2, 4) if t * p * c < 16]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda s: "tp{}_pp{}_cp{}".format(*s))
def test_layout(tiny_checkpoint: Path, truth: Any, layout: tuple[int, int, int]) -> None:
    """Video, sharing and packing on."""
    tensor, pipeline, context = layout
    _assert_same(tiny_checkpoint, Case(tensor, pipeline, context), truth)


@pytest.mark.full
def test_sixteen_ranks(tiny_checkpoint: Path, truth: Any) -> None:
    _assert_same(tiny_checkpoint, Case(2, 2, 4), truth)


SWITCHES = [
    *[Case(*sizes, comm=comm) for sizes in [(1, 1, 4), (2, 1, 2), (1, 2, 2)] for comm in ("p2p", "a2a")],
    *[Case(*sizes, share=False) for sizes in [(1, 1, 4), (2, 1, 2), (1, 2, 2)]],
    *[Case(*sizes, budget=ONE_BY_ONE) for sizes in [(1, 1, 4), (2, 1, 2), (1, 2, 2)]],
    *[Case(*sizes, recompute="full") for sizes in [(1, 1, 4), (2, 1, 2), (1, 2, 2)]],
    *[Case(*sizes, recompute="selective", comm="p2p") for sizes in [(1, 1, 4), (2, 1, 2), (1, 2, 2)]],
    Case(2, 1, 2, recompute="full", frozen=(EMBEDDING,)),
    Case(1, 1, 2, data=2, comm="a2a", budget=ONE_BY_ONE),
]


@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_switches(tiny_checkpoint: Path, truth: Any, case: Case) -> None:
    """Every way of context parallelism and every switch, on three layouts."""
    _assert_same(tiny_checkpoint, case, truth)
