# SPDX-License-Identifier: Apache-2.0
"""Each adaptation in vllm_adaptations.py is still needed: without it, this vLLM has the fault that it mends.

A test that fails here after an upgrade says that an adaptation can go.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_rl.rollout import vllm_adaptations, vllm_engine
from megatron_rl.runtime.device import choose_backend
from tests.rollout_parts import join_world, open_plain_engine
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")


def _pack_linear(rank: int, adapted: bool) -> tuple[tuple[int, ...], float]:
    """(shape of the weight after loading, how far the output is off after the weight was doubled in place)."""
    import vllm.model_executor.layers.utils as layer_utils
    import vllm.platforms

    assert vllm.platforms.current_platform.is_cpu()
    if adapted:
        vllm_adaptations.keep_cpu_linear_weights()
    layer = torch.nn.Linear(128, 64, bias=False).requires_grad_(False)
    original, x = layer.weight, torch.randn(3, 128)
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    original.mul_(2)
    off = (layer.cpu_linear(x, layer.weight, None) - x @ original.T).abs().max()
    return tuple(layer.weight.shape), float(off)


def test_vllm_packs_linear_weights_away_on_a_cpu() -> None:
    [(shape, off)] = run_world(1, _pack_linear, False)
    assert shape == (0,) and off > 0.1
    [(shape, off)] = run_world(1, _pack_linear, True)
    assert shape == (64, 128) and off < 1e-5


def test_vllm_takes_no_item_larger_than_a_scheduled_batch() -> None:
    from vllm.config.scheduler import SchedulerConfig

    def sizes() -> tuple[int, int]:
        config = SchedulerConfig(
            max_model_len=16_384,
            is_encoder_decoder=False,
            max_num_batched_tokens=2048,
            max_num_seqs=8,
            enable_chunked_prefill=True,
        )
        return config.max_num_encoder_input_tokens, config.encoder_cache_size

    assert sizes() == (2048, 2048)
    with vllm_adaptations.encoder_budget(16_384):
        assert sizes() == (16_384, 16_384)
    assert sizes() == (2048, 2048)


def _inspect_model(rank: int, cache: Path, adapted: bool) -> str:
    """What becomes of looking at a model class when no process may be started."""
    os.environ["VLLM_CACHE_ROOT"] = str(cache)
    from vllm.model_executor.models.registry import ModelRegistry

    if adapted:
        vllm_adaptations.inspect_models_in_process()
    model = ModelRegistry.models["Qwen2_5_VLForConditionalGeneration"]
    with mock.patch.object(subprocess, "run", side_effect=PermissionError("no process")):
        try:
            return model.inspect_model_cls().architecture
        except PermissionError as error:
            return str(error)


def test_vllm_raises_low_temperatures_with_a_warning_only() -> None:
    """When it does not, rollout.temperature may be lower than 0.01 (megatron_rl/config/checks.py)."""
    from vllm import SamplingParams

    assert SamplingParams(temperature=0.005).temperature == 0.01


def test_vllm_looks_at_model_classes_in_a_process_of_their_own(tmp_path: Path) -> None:
    assert run_world(1, _inspect_model, tmp_path / "a", False) == ["no process"]
    assert run_world(1, _inspect_model, tmp_path / "b", True) == ["Qwen2_5_VLForConditionalGeneration"]


def test_vllm_takes_noise_back_after_a_chunk_which_cpu_generators_cannot() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "set_offset(gen.get_offset()" in inspect.getsource(GPUModelRunner)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.Generator("cpu").get_offset()
    assert not choose_backend("cpu").chunked_prefill


def _build_and_shut_down(rank: int, folder: Path) -> dict[str, Any]:
    """An engine is built with a look at what vLLM leaves behind, then ended as vLLM itself would."""
    join_world()
    os.environ["LOCAL_WORLD_SIZE"] = "5"
    torch.manual_seed(11)
    before, build = torch.get_rng_state(), vllm_engine._build
    seen: dict[str, Any] = {}

    def watched(*args: Any) -> Any:
        llm = build(*args)
        seen["reseeded inside"] = not torch.equal(torch.get_rng_state(), before)
        seen["local world inside"] = os.environ["LOCAL_WORLD_SIZE"]
        return llm

    with mock.patch.object(vllm_engine, "_build", watched):
        engine = open_plain_engine(folder)
    seen["reseeded after"] = not torch.equal(torch.get_rng_state(), before)
    seen["local world after"] = os.environ["LOCAL_WORLD_SIZE"]
    seen["identity"] = os.environ["VLLM_DIST_IDENT"]
    engine._llm.llm_engine.engine_core.engine_core.shutdown()  # what vLLM would call at garbage collection or exit
    seen["trainer's group survives"] = dist.is_initialized()
    return seen


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path) -> dict[str, Any]:
    [seen] = run_world(1, _build_and_shut_down, tiny_checkpoint, timeout=180)
    return seen


def test_vllm_reseeds_the_process(built: dict[str, Any]) -> None:
    assert built["reseeded inside"] and not built["reseeded after"]


def test_vllm_overwrites_the_launchers_local_world(built: dict[str, Any]) -> None:
    assert (built["local world inside"], built["local world after"]) == ("1", "5")


def test_vllms_own_shutdown_destroys_the_trainers_group(built: dict[str, Any]) -> None:
    assert not built["trainer's group survives"]


def test_all_jobs_of_a_machine_share_one_name_in_vllm(built: dict[str, Any]) -> None:
    assert built["identity"] == "//", "the launcher's address has no port"


def _shared_memory_names(rank: int) -> list[str]:
    join_world()
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    os.environ["VLLM_DIST_IDENT"] = "//"
    names = []
    for _ in range(2):
        with vllm_adaptations.private_shared_memory():
            names.append(_CPUSHMDistributed.make_group_name(SimpleNamespace(unique_name="tp:0", ranks=[0, 1])))
    return names


def test_engines_name_their_shared_memory_alike_on_all_ranks_and_never_twice() -> None:
    first, second = run_world(2, _shared_memory_names)
    assert first == second
    assert len(set(first)) == 2 and not any("/" in name for name in first)


def _shared_memory_of_a_failure(rank: int) -> list[bool]:
    """Whether a file is there while an engine is built, and once that has failed on one of two ranks."""
    join_world()
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    os.environ["VLLM_DIST_IDENT"] = "//"
    there = []
    with pytest.raises(ValueError, match="no room"), vllm_adaptations.private_shared_memory():
        name = _CPUSHMDistributed.make_group_name(SimpleNamespace(unique_name="tp:0", ranks=[0, 1]))
        file = Path("/dev/shm") / f"{name}_{rank}"
        file.touch()
        there.append(file.exists())
        dist.barrier()
        raise ValueError("no room")
    there.append(file.exists())
    return there


def test_an_engine_that_cannot_be_built_leaves_no_shared_memory_behind() -> None:
    assert run_world(2, _shared_memory_of_a_failure) == [[True, False]] * 2


def _without_weights(name: str, module: str) -> Any:
    """A model class of vLLM without its layers: the methods in question read the configuration only."""
    model: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    made = model.__new__(model)
    torch.nn.Module.__init__(made)
    made.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2.0))
    return made


def test_vllms_models_take_embeddings_in_fields_of_their_own_only(heavy_imports: None) -> None:
    model, rows = _without_weights("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"), torch.randn(2, 3, 4)
    assert list(model.embed_multimodal(embeds=rows) or ()) == []
    vllm_adaptations.take_given_media(model)
    assert all(torch.equal(a, b) for a, b in zip(model.embed_multimodal(embeds=rows), rows, strict=True))


def test_vllms_models_work_out_positions_from_fields_of_their_own_only(heavy_imports: None) -> None:
    model = _without_weights("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")
    ours = torch.tensor([[0, 1, 9], [0, 1, 2], [0, 1, 4]])
    place = SimpleNamespace(offset=1, length=1)
    feature = SimpleNamespace(modality="video", mm_position=place, data={"positions": SimpleNamespace(data=ours)})
    with pytest.raises(KeyError):
        model.get_mrope_input_positions([5, 6, 7], [feature])
    vllm_adaptations.take_given_positions(model)
    positions, ahead = model.get_mrope_input_positions([5, 6, 7], [feature])
    assert torch.equal(positions, ours) and ahead == 9 + 1 - 3
    text, ahead = model.get_mrope_input_positions([5, 6, 7], [])
    assert text.tolist() == [[0, 1, 2]] * 3 and ahead == 0


@pytest.mark.parametrize("module", ["qwen3_vl", "qwen3_vl_moe"])
def test_vllm_leaves_deepstack_out_where_the_tower_is_missing(heavy_imports: None, module: str) -> None:
    """The condition is read from the source: whether the vision tower is a StageMissingLayer of this module."""
    models = importlib.import_module(f"vllm.model_executor.models.{module}")
    assert "not isinstance(self.visual, StageMissingLayer)" in " ".join(inspect.getsource(models).split())
    missing = models.StageMissingLayer("visual")
    with vllm_adaptations.deepstack_without_encoder():
        assert not isinstance(missing, models.StageMissingLayer)
    assert isinstance(missing, models.StageMissingLayer)
