# SPDX-License-Identifier: Apache-2.0
"""Adaptations of vLLM 0.32, one named function each; tests/dist/test_vllm_adaptations.py fails when one can go."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.runtime.device import define_torchvision_operators


@contextmanager
def launcher_environment() -> Iterator[None]:
    """vLLM overwrites torchrun's LOCAL_WORLD_SIZE with its tensor parallel size; give it back."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def inspect_models_in_process() -> None:
    """vLLM 0.32 inspects a model class in a fresh Python process, to keep CUDA out of its own.

    Ours holds the device anyway, and a fresh process would not have the declarations of define_torchvision_operators.
    """
    import vllm.model_executor.models.registry

    define_torchvision_operators()
    registry: Any = vllm.model_executor.models.registry
    registry._run_in_subprocess = lambda function: function()


def keep_cpu_linear_weights() -> None:
    """vLLM 0.32 on a CPU repacks every linear weight after loading and leaves an empty parameter: keep the live ones.

    Its own fallback, torch's linear on the live weight, sees in-place updates. Must run before the model is built.
    """
    import vllm.model_executor.layers.utils as layer_utils

    def read_live_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layer_utils.dispatch_cpu_unquantized_gemm = read_live_weight


def keep_cpu_expert_weights() -> None:
    """As `keep_cpu_linear_weights` for mixtures of experts, whose weights vLLM 0.32 packs for a kernel of its own: keep
    the live ones, and compute one expert after the other with torch. Must run before the model is built."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def leave_unpacked(self: Any, layer: torch.nn.Module) -> None:
        self._use_zentorch = False

    def apply(self: Any, *, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, **more: Any) -> None:
        assert more["activation"].value == "silu", more["activation"]
        chosen, total = more["topk_ids"], torch.zeros_like(output, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = torch.nn.functional.linear(hidden_states[token], w1[expert]).chunk(2, dim=-1)
            made = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2[expert])
            total.index_add_(0, token, made.float() * more["topk_weights"][token, place, None])
        output.copy_(total)

    experts: Any = CPUUnquantizedExperts
    experts.process_weights_after_loading = leave_unpacked
    experts.apply = apply


@contextmanager
def private_shared_memory() -> Iterator[None]:
    """Give the shared memory of this engine's tensor parallel group a name of its own, and unlink it once all have it
    open.

    vLLM 0.32 on a CPU with AVX-512 names it after the port in the launcher's address. `external_launcher` has none, so
    every job of a machine takes the same name, and what a killed job leaves behind stops all that follow. The ranks
    wait by spinning, so where they outnumber the cores they talk through torch.distributed instead.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator, _CPUSHMDistributed

    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    own_name = _CPUSHMDistributed.make_group_name

    def unique_name(communicator: Any) -> str:
        return f"{token[0]}{own_name(communicator)}".replace("/", "")

    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    agrees = CpuCommunicator._all_group_ranks_share_shm_group_name
    enough_cores = len(os.sched_getaffinity(0)) >= num_local
    try:
        with (
            mock.patch.object(_CPUSHMDistributed, "make_group_name", staticmethod(unique_name)),
            mock.patch.object(
                CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: agrees(self) and enough_cores
            ),
        ):
            yield
        dist.barrier()
    finally:  # of an engine that cannot be built nobody else will
        for path in Path("/dev/shm").glob(f"{token[0]}*"):
            path.unlink(missing_ok=True)


@contextmanager
def encoder_budget(num_tokens: int) -> Iterator[None]:
    """Let one item be as long as the engine's context.

    vLLM 0.32 sizes its encoder cache by max_num_batched_tokens and refuses larger items, precomputed ones too.
    """
    from vllm.config.scheduler import SchedulerConfig

    original = SchedulerConfig.__post_init__

    def with_room(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.max_num_encoder_input_tokens = max(self.max_num_encoder_input_tokens, num_tokens)
        self.encoder_cache_size = max(self.encoder_cache_size, num_tokens)

    with mock.patch.object(SchedulerConfig, "__post_init__", with_room):
        yield


def take_given_media(model: Any) -> None:
    """A model of vLLM 0.32 makes embeddings of pictures and sound itself, or takes ready ones in fields that differ
    between families, for some kinds in none: return the rows that the request holds."""

    def given(embeds: Sequence[Tensor], positions: object = None) -> tuple[Tensor, ...]:
        return tuple(embeds)

    model.embed_multimodal = given


def take_given_positions(model: Any) -> None:
    """A model of vLLM 0.32 works out the rotary positions of media from its own processor's fields, by rules that are
    not the trainer's for every family: take those of the request. Text counts up."""

    def given(tokens: Sequence[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        """(int64 [3, tokens], how far the next position is from the number of tokens)."""
        positions = features[0].data["positions"].data if features else torch.arange(len(tokens)).expand(3, -1)
        return positions, int(positions.max()) + 1 - len(tokens)

    model.get_mrope_input_positions = given


@contextmanager
def deepstack_without_encoder() -> Iterator[None]:
    """Models of vLLM 0.32 whose layers take features of the vision encoder leave these out without an error where the
    encoder is missing. They look for it while they are built; inside the block they find one."""
    import vllm.model_executor.models.qwen3_vl as qwen3_vl
    import vllm.model_executor.models.qwen3_vl_moe as qwen3_vl_moe

    class Nothing:
        """No module is one."""

    with ExitStack() as patches:
        for module in (qwen3_vl, qwen3_vl_moe):
            patches.enter_context(mock.patch.object(module, "StageMissingLayer", Nothing))
        yield
