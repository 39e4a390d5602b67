# SPDX-License-Identifier: Apache-2.0
"""Virtual pipeline parallelism: stages of several chunks learn, save and sync as one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.runtime.grid import Grid
from megatron_rl.training import checkpoint
from megatron_rl.weight_sync.plan import build_plan
from megatron_rl.weight_sync.resharder import Resharder
from tests import tiny_policy as tp
from tests.world import run_world

NUM_LAYERS = 6  # three stages of two chunks of one layer
TOLERANCE = 1e-5


def write_deep(folder: Path, tied: bool) -> Path:
    from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = NUM_LAYERS, text.layer_types[:1] * NUM_LAYERS
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    make_model(config, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["untied", "tied"])
def deep(request: pytest.FixtureRequest, heavy_imports: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep(tmp_path_factory.mktemp("deep") / request.param, request.param == "tied")


def _learn(rank: int, folder: Path, pipeline: int, virtual: int, root: Path) -> Any:
    """(metrics of an update, its gradients), then a checkpoint after a second update."""
    trainer = tp.open_trainer(folder, tp.join(1, pipeline, virtual=virtual), tp.MEASURE)
    samples = tp.mixed_samples(trainer.provider)
    batches = tp.off_policy(trainer.pack(samples, 64))
    assert virtual == 1 or len(batches) % pipeline == 0
    embeds = tp.random_embeds(samples)
    old = trainer.policy.logprobs([b.batch for b in batches], embeds)
    metrics = trainer.policy.train(batches, embeds, PpoClip(kl_coef=0.1), step=0)
    gradients = tp.gradients(trainer)
    with trainer.policy.offloaded():
        pass
    checkpoint.save(root, 1, trainer.policy, trainer.mesh, {}, str(folder))
    lengths = [len(s.response_ids) for s in samples]
    pairs = [] if old[0] is None else zip(batches, old, strict=True)
    scored = {i: lp for b, values in pairs for i, lp in _by_sample(b.batch, values, lengths)}
    return metrics, gradients, scored


def _by_sample(batch: Any, logprobs: Tensor, lengths: list[int]) -> list[tuple[int, Tensor]]:
    return list(zip(batch.samples, logprobs.split([lengths[i] for i in batch.samples]), strict=True))


def _load(rank: int, folder: Path, root: Path, pipeline: int, virtual: int) -> list[tp.WeightPart]:
    trainer = tp.open_trainer(folder, tp.join(1, pipeline, virtual=virtual))
    checkpoint.load(checkpoint.step_folder(root, 1), trainer.policy, trainer.mesh)
    return tp.weights(trainer)


def test_chunks_learn_and_save_what_one_rank_does(deep: Path, tmp_path: Path) -> None:
    ((metrics, gradients, logprobs),) = run_world(1, _learn, deep, 1, 1, tmp_path / "one")
    ranks = run_world(3, _learn, deep, 3, 2, tmp_path / "chunks")
    provider = tp.open_provider(deep)
    errors = tp.relative_errors(
        tp.assemble(provider, [pieces for _, pieces, _ in ranks]), tp.assemble(provider, [gradients])
    )
    assert max(errors.values()) <= TOLERANCE, errors
    for name, (top, bottom) in metrics.items():
        assert ranks[2][0][name] == pytest.approx((top, bottom), rel=TOLERANCE, abs=1e-5), name
    for sample, expected in logprobs.items():
        torch.testing.assert_close(ranks[2][2][sample], expected, rtol=0, atol=1e-5)
    one = tp.assemble(provider, run_world(1, _load, deep, tmp_path / "chunks", 1, 1))
    two = tp.assemble(provider, run_world(3, _load, deep, tmp_path / "one", 3, 2))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _sync(rank: int, folder: Path) -> dict[str, Tensor]:
    trainer = tp.open_trainer(folder, tp.join(1, 3, virtual=2))
    provider = trainer.provider
    grid, engine = Grid(6, pipeline=3, virtual=2), Grid(6, tensor=2)
    target = {
        entry.engine: torch.randn(entry.layout.engine(entry.hf, rank % 2, 2).shape)
        for entry in provider.weight_map.entries.values()
    }
    source = {name: p.data for name, p in trainer.policy.language_model.named_weights().items()}
    plan = build_plan(provider.weight_map, NUM_LAYERS, grid, engine)
    report = Resharder(plan, rank, source, target, 1 << 20).sync(0, verify=True)
    assert report.received == report.minimum > 0
    return target


def test_chunks_sync_what_the_checkpoint_holds(deep: Path) -> None:
    from model_providers.hf_checkpoint import HfCheckpoint, load_shard

    provider, hf = tp.open_provider(deep), HfCheckpoint(deep)
    for rank, target in enumerate(run_world(6, _sync, deep)):
        for entry in provider.weight_map.entries.values():
            shard = entry.layout.engine(entry.hf, rank % 2, 2)
            expected = torch.empty(shard.shape)
            load_shard(expected, shard.blocks, hf)
            assert torch.equal(target[entry.engine], expected), entry.engine
