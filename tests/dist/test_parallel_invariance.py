# SPDX-License-Identifier: Apache-2.0
"""I3: where a sample is computed, and beside which others, changes neither the loss nor any gradient.

World 1 with everything in one micro-batch is the truth; test_model_parity.py checks that one against transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import PpoClip
from model_providers import layer, transformer
from tests import tiny_policy as tp
from tests.world import run_world

Grid = tuple[int, int, int]  # tensor, pipeline, data
Result = tuple[dict[str, float], dict[str, Tensor]]  # mean metrics, gradient by Hugging Face name

GRIDS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)]
TIED_GRIDS = [(2, 1, 1), (1, 2, 1), (1, 2, 2)]
TOLERANCE = 1e-5
LONGEST = 47  # tokens of the longest of the mixed samples: the smallest budget there is
EMBEDDING = "embedding.word_embeddings.weight"


def _measure(
    folder: Path,
    tensor: int,
    pipeline: int,
    budget: int = 4096,
    num_samples: int = 5,
    chunk: int = 1024,
    rows: int = 8192,
    **options: Any,
) -> Any:
    """(metric sums, gradient pieces, number of micro-batches) of one update with learning rate 0 on this rank."""
    transformer.LOGIT_CHUNK, layer.FEED_FORWARD_ROWS = chunk, rows
    trainer = tp.open_trainer(folder, tp.join(tensor, pipeline), tp.MEASURE, **options)
    samples = tp.mixed_samples(trainer.provider)[:num_samples]
    batches = tp.off_policy(trainer.pack(samples, budget))
    metrics = trainer.policy.train(batches, tp.random_embeds(samples), PpoClip(kl_coef=0.1), step=0)
    return metrics, tp.gradients(trainer), len(batches)


def _run(folder: Path, grid: Grid, num_microbatches: int = 1, **options: Any) -> Result:
    tensor, pipeline, data = grid
    ranks = run_world(tensor * pipeline * data, lambda _: _measure(folder, tensor, pipeline, **options))
    assert {n for *_, n in ranks} == {num_microbatches}
    sums: dict[str, Tensor] = {}
    for metrics, *_ in ranks:
        for name, pair in metrics.items():
            sums[name] = sums.get(name, torch.zeros(2)) + torch.tensor(pair)
    means = {name: float(top / bottom) for name, (top, bottom) in sums.items()}
    return means, tp.assemble(tp.open_provider(folder), [pieces for _, pieces, _ in ranks])


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Path) -> Result:
    return _run(tiny_checkpoint, (1, 1, 1))


@pytest.fixture(scope="module")
def tied_truth(tied_checkpoint: Path) -> Result:
    return _run(tied_checkpoint, (1, 1, 1))


def _assert_same(result: Result, truth: Result) -> None:
    errors = tp.relative_errors(result[1], truth[1])
    assert max(errors.values()) <= TOLERANCE, errors
    assert result[0] == pytest.approx(truth[0], rel=TOLERANCE, abs=1e-6)


def _name(grid: Grid) -> str:
    return "tp{}_pp{}_dp{}".format(*grid)


def test_the_measure_itself(truth: Result) -> None:
    """A loss with clipped and unclipped tokens, a KL term, and a gradient norm that is the norm of the gradients."""
    metrics, gradients = truth
    assert 0 < metrics["actor/pg_clipfrac_higher"] < 1 and metrics["actor/kl_loss"] > 0
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm()
    assert metrics["actor/grad_norm"] == pytest.approx(float(norm), rel=TOLERANCE)


@pytest.mark.parametrize("grid", GRIDS, ids=_name)
def test_grid(tiny_checkpoint: Path, truth: Result, grid: Grid) -> None:
    _assert_same(_run(tiny_checkpoint, grid), truth)


@pytest.mark.parametrize("grid", TIED_GRIDS, ids=_name)
def test_grid_with_tied_embeddings(tied_checkpoint: Path, tied_truth: Result, grid: Grid) -> None:
    _assert_same(_run(tied_checkpoint, grid), tied_truth)


@pytest.mark.parametrize(("grid", "num_microbatches"), [((1, 1, 1), 3), ((2, 2, 1), 3), ((1, 2, 2), 2)])
def test_many_micro_batches(tiny_checkpoint: Path, truth: Result, grid: Grid, num_microbatches: int) -> None:
    _assert_same(_run(tiny_checkpoint, grid, num_microbatches, budget=LONGEST), truth)


def test_logits_in_chunks(tiny_checkpoint: Path, truth: Result) -> None:
    _assert_same(_run(tiny_checkpoint, (2, 1, 1), chunk=3), truth)


@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 2, 2)], ids=_name)
def test_fewer_samples_than_data_parallel_ranks(tiny_checkpoint: Path, grid: Grid) -> None:
    """The second data parallel rank has an empty micro-batch; it must take part and add nothing."""
    _assert_same(_run(tiny_checkpoint, grid, num_samples=1), _run(tiny_checkpoint, (1, 1, 1), num_samples=1))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 2, 1)], ids=_name)
def test_recompute(tiny_checkpoint: Path, truth: Result, grid: Grid, recompute: str) -> None:
    _assert_same(_run(tiny_checkpoint, grid, recompute=recompute), truth)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 2, 1)], ids=_name)
def test_recompute_by_few_rows(tiny_checkpoint: Path, truth: Result, grid: Grid, recompute: str) -> None:
    """Seven do not divide the rows of a micro-batch; a rank of two has three of them."""
    _assert_same(_run(tiny_checkpoint, grid, rows=7, recompute=recompute), truth)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1)], ids=_name)
def test_frozen_embedding_leaves_the_other_gradients_as_they_were(
    tiny_checkpoint: Path, truth: Result, grid: Grid, recompute: str
) -> None:
    _, gradients = _run(tiny_checkpoint, grid, recompute=recompute, frozen=[EMBEDDING])
    expected = {name: g for name, g in truth[1].items() if name != "model.embed_tokens.weight"}
    assert len(expected) == len(truth[1]) - 1
    _assert_same((truth[0], gradients), (truth[0], expected))


def test_every_parameter_gets_a_gradient(truth: Result, tied_truth: Result) -> None:
    """Of every row but those that tokens absent from the samples have in the embedding."""
    for _, gradients in (truth, tied_truth):
        assert all(g.norm() > 0 for g in gradients.values())
    assert truth[1]["lm_head.weight"].norm(dim=1).gt(0).sum() >= 256
