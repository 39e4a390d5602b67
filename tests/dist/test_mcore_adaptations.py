# SPDX-License-Identifier: Apache-2.0
"""Each adaptation of Megatron-core is still needed (delete it when its test fails) and leaves no trace outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.overrides import _get_current_function_mode_stack

from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.runtime import parallel
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.mcore_on_cpu import _patches, redirect_cuda_to_cpu
from megatron_rl.training import checkpoint, policy
from model_providers.transformer import RMSNorm, transformer_config
from tests import tiny_policy as tp
from tests.world import run_world

WITHOUT_SCOPE = replace(tp.BACKEND, mcore_scope=nullcontext)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA calls succeed here")


def _initialize(folder: Path) -> None:
    parallel.initialize(WITHOUT_SCOPE, Grid(1), Grid(1))


def _build(folder: Path) -> None:
    tp.open_provider(folder).build_language(WITHOUT_SCOPE, tp.join())


def _wrap(folder: Path) -> None:
    mesh = tp.join()
    policy.Policy(tp.open_provider(folder).build_language(tp.BACKEND, mesh), WITHOUT_SCOPE, mesh, tp.HYPER)


def _trainer_without_scope(folder: Path) -> tp.Trainer:
    trainer = tp.open_trainer(folder, tp.join())
    trainer.policy.backend = WITHOUT_SCOPE
    return trainer


def _forward(folder: Path) -> None:
    trainer = _trainer_without_scope(folder)
    samples = tp.mixed_samples(trainer.provider)
    trainer.policy.logprobs(trainer.pack(samples), tp.random_embeds(samples))


def _park(folder: Path) -> None:
    with _trainer_without_scope(folder).policy.offloaded():
        raise ValueError("not reached")


@needs_no_gpu
@pytest.mark.parametrize("use", [_initialize, _build, _wrap, _forward, _park], ids=lambda f: f.__name__.strip("_"))
def test_megatron_core_asks_for_cuda_without_the_scope(tiny_checkpoint: Path, use: Callable[[Path], None]) -> None:
    def fn(rank: int) -> None:
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            use(tiny_checkpoint)

    run_world(1, fn)


def _patched_attributes() -> list[Any]:
    """What the scope replaces, as it is now; the scope may also define a name that does not exist outside."""
    return [getattr(owner, name, "not defined") for owner, name, _ in _patches()]


@needs_no_gpu
def test_the_scope_redirects_and_is_undone() -> None:
    before = _patched_attributes()
    with pytest.raises(KeyError, match="deliberate"), redirect_cuda_to_cpu():
        assert all(now is not old for now, old in zip(_patched_attributes(), before, strict=True))
        for made in (
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
            torch.ones(2).cuda(),
            torch.ones(2).to("cuda"),
            torch.ones(2).to(device=torch.cuda.current_device()),
        ):
            assert made.device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        raise KeyError("deliberate")
    assert _patched_attributes() == before
    _assert_ordinary_torch()


def _assert_ordinary_torch() -> None:
    assert not _get_current_function_mode_stack()
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        torch.ones(2).cuda()


def _work_and_look_outside(folder: Path) -> None:
    before = _patched_attributes()
    trainer = tp.open_trainer(folder, tp.join())
    samples = tp.mixed_samples(trainer.provider)
    batches, embeds = trainer.pack(samples), tp.random_embeds(samples)
    with trainer.policy.offloaded():
        _assert_ordinary_torch()  # where the engine works
    trainer.policy.logprobs(batches, embeds)
    trainer.policy.train(tp.unscored(batches), embeds, NllLoss(), step=0)
    assert _patched_attributes() == before
    _assert_ordinary_torch()


@needs_no_gpu
def test_nothing_leaks_out_of_the_policy(tiny_checkpoint: Path) -> None:
    run_world(1, lambda _: _work_and_look_outside(tiny_checkpoint))


def _trainer_with_torchs_adamw(folder: Path, num_updates: int) -> tp.Trainer:
    policy.install_group_step_adamw = lambda: None  # in this process only
    trainer = tp.open_trainer(folder, tp.join())
    assert type(trainer.policy.optimizer.optimizer) is torch.optim.AdamW
    samples = tp.mixed_samples(trainer.provider)
    batches, embeds = tp.unscored(trainer.pack(samples)), tp.random_embeds(samples)
    for step in range(num_updates):
        trainer.policy.train(batches, embeds, NllLoss(), step)
    return trainer


def _save_with_torchs_adamw(folder: Path, root: Path) -> None:
    trainer = _trainer_with_torchs_adamw(folder, num_updates=1)
    checkpoint.save(root, 1, trainer.policy, trainer.mesh, {}, hf_source=str(folder))


def _fail_to_load_with_torchs_adamw(folder: Path, root: Path, num_updates: int) -> None:
    trainer = _trainer_with_torchs_adamw(folder, num_updates)
    with pytest.raises((AssertionError, KeyError)) as error:
        checkpoint.load(checkpoint.step_folder(root, 1), trainer.policy, trainer.mesh)
    assert error.traceback[-1].path.name == "distrib_optimizer.py"


@needs_no_gpu
def test_torchs_adamw_still_cannot_be_resumed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Why GroupStepAdamW exists: Megatron-core loads neither into a new process nor into one that has made updates."""
    run_world(1, lambda _: _save_with_torchs_adamw(tiny_checkpoint, tmp_path))
    for num_updates in (0, 1):
        run_world(1, lambda _, n=num_updates: _fail_to_load_with_torchs_adamw(tiny_checkpoint, tmp_path, n))


def _norms(folder: Path) -> None:
    mesh = tp.join(tensor=2)
    config = transformer_config(tp.open_provider(folder).shape, tp.BACKEND, mesh, recompute="none")
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config, 8)
    ours: Any = RMSNorm(config, 8, eps=1e-6)
    assert ours.weight.sequence_parallel
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))


def test_megatron_cores_own_norm_still_refuses_sequence_parallelism(tiny_checkpoint: Path) -> None:
    run_world(2, lambda _: _norms(tiny_checkpoint))
