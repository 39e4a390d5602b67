# SPDX-License-Identifier: Apache-2.0
"""I5 across layouts: the tools write what a model of any layout reads, and export what any layout saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.hf_to_mcore import hf_to_mcore
from checkpoint_tools.mcore_to_hf import mcore_to_hf
from checkpoint_tools.verify import verify
from tests import tiny_policy as tp
from tests.world import run_world

LAYOUTS = [(1, 1), (2, 2), (4, 1)]


def _load_and_compare(source: Path, mcore: Path, tensor: int, pipeline: int) -> list[str]:
    """Names of this rank's parameters, after checking that both ways of loading them give the same bits."""
    from megatron_rl.training import checkpoint

    trainer = tp.open_trainer(source, tp.join(tensor, pipeline))
    named = trainer.policy.language_model.named_weights()
    from_hf = {name: param.detach().clone() for name, param in named.items()}
    for param in named.values():
        param.data.fill_(float("nan"))
    checkpoint.load_weights(mcore, trainer.policy)
    for name, param in named.items():
        assert torch.equal(param, from_hf[name]), name
    return list(named)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_any_layout_loads_what_hf_to_mcore_writes(
    tiny_checkpoint: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    hf_to_mcore(tiny_checkpoint, tmp_path / "mcore", tensor, pipeline)
    ranks = run_world(
        tensor * pipeline, lambda _: _load_and_compare(tiny_checkpoint, tmp_path / "mcore", tensor, pipeline)
    )
    assert len({name for names in ranks for name in names}) == 2 * 7 + 3


def test_a_tied_model_on_two_stages_loads_it(tied_checkpoint: Path, tmp_path: Path) -> None:
    hf_to_mcore(tied_checkpoint, tmp_path / "mcore")
    run_world(2, lambda _: _load_and_compare(tied_checkpoint, tmp_path / "mcore", 1, 2))


def _train_shift_and_save(source: Path, root: Path, tensor: int, pipeline: int) -> None:
    """Save after one update without effect (it fills the optimizer's state) and adding 1 to every weight."""
    from megatron_rl.algorithms.losses import NllLoss
    from megatron_rl.training import checkpoint

    mesh = tp.join(tensor, pipeline)
    trainer = tp.open_trainer(source, mesh, tp.MEASURE)
    samples = tp.mixed_samples(trainer.provider)
    trainer.policy.train(tp.unscored(trainer.pack(samples)), tp.random_embeds(samples), NllLoss(), step=0)
    for param in trainer.policy.language_model.parameters():
        param.data.add_(1)
    checkpoint.save(root, 3, trainer.policy, mesh, {}, str(source))


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_what_any_layout_saves_is_exported(tiny_checkpoint: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    _save_in_a_world(tiny_checkpoint, tmp_path, tensor, pipeline)
    _check_export(tiny_checkpoint, tmp_path)


def test_what_a_tied_model_on_two_stages_saves_is_exported(tied_checkpoint: Path, tmp_path: Path) -> None:
    _save_in_a_world(tied_checkpoint, tmp_path, 1, 2)
    _check_export(tied_checkpoint, tmp_path)


def _save_in_a_world(source: Path, root: Path, tensor: int, pipeline: int) -> None:
    run_world(tensor * pipeline, lambda _: _train_shift_and_save(source, root, tensor, pipeline))


def _check_export(source: Path, root: Path) -> None:
    step = root / "step_3"
    mcore_to_hf(step, root / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, root / "hf"))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        frozen = name.startswith("visual.")
        assert torch.equal(tensor, before[name] if frozen else before[name] + 1), name
    (report,) = run_world(1, lambda _: verify(root / "hf", step, logits=True))
    assert not report.differences and report.logprob_gap is not None


def _keys(folder: Path) -> dict[str, Any]:
    """{key: (shape, dtype)} of what a checkpoint file holds beside the optimizer; objects have neither."""
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    return {
        key: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else None
        for key, entry in entries
        if not key.startswith("optimizer.")
    }


@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_the_file_holds_what_training_saves(
    kind: str, tiny_checkpoint: Path, tied_checkpoint: Path, tmp_path: Path
) -> None:
    source = {"tiny": tiny_checkpoint, "tied": tied_checkpoint}[kind]
    _save_in_a_world(source, tmp_path, 1, 1)
    hf_to_mcore(source, tmp_path / "mcore")
    written, trained = _keys(tmp_path / "mcore"), _keys(tmp_path / "step_3")
    for_gpu = {"decoder.final_layernorm._extra_state/shard_0_1": None}
    assert written == trained | for_gpu
    assert ("output_layer.weight" in written) == (kind == "tiny")


def test_inspect_tells_training_state_from_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from checkpoint_tools.inspect import inspect

    _save_in_a_world(tiny_checkpoint, tmp_path, 2, 1)
    hf_to_mcore(tiny_checkpoint, tmp_path / "mcore")
    trained, converted = inspect(tmp_path), inspect(tmp_path / "mcore")
    assert (trained.step, trained.optimizer) == (3, True)
    assert (converted.step, converted.optimizer) == (None, False)
    assert trained.groups == converted.groups and trained.num_parameters == converted.num_parameters
