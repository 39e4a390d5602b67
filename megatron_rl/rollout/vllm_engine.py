# SPDX-License-Identifier: Apache-2.0
"""vLLM in process, one engine per rollout replica: the only module that imports vllm.

torchrun's ranks form the engine's tensor parallel groups (`external_launcher`); every rank of a replica makes the same
calls and sees the same tokens. The engine holds the language model only; video arrives as embeddings, and its live
parameters are written in place by the resharder.
"""

from __future__ import annotations

import gc
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.runtime.device import Backend, define_torchvision_operators
from megatron_rl.types import FORBIDDEN_BIAS, Completion, Prompt, Sampling

EnginePrompt = Callable[[Prompt, Mapping[str, Tensor]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How one replica is built. `kv_cache_bytes` 0 = vLLM takes its share of `gpu_memory_utilization`."""

    folder: str
    tensor: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    gpu_memory_utilization: float
    enforce_eager: bool


class VllmEngine:
    """One rank's part of a vLLM replica (protocol RolloutEngine)."""

    def __init__(
        self,
        settings: EngineSettings,
        backend: Backend,
        forbidden_tokens: Sequence[int],
        eos_token_ids: Sequence[int],
        engine_prompt: EnginePrompt,
        detokenize: Callable[[Sequence[int]], str],
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._backend, self._engine_prompt, self._detokenize = backend, engine_prompt, detokenize
        self._bias = dict.fromkeys(forbidden_tokens, FORBIDDEN_BIAS)
        self._eos = list(eos_token_ids)
        self._version: int | None = None
        self._cached_version: int | None = None
        if not backend.engine_owns_weights:
            keep_cpu_linear_weights()
            keep_cpu_expert_weights()
        inspect_models_in_process()
        with (
            _launcher_environment(),
            torch.random.fork_rng(),
            encoder_budget(settings.max_model_len),
            private_shared_memory(),
        ):
            self._llm = _build(settings, backend)
        client = self._llm.llm_engine.engine_core
        client._finalizer.detach()  # vLLM's own shutdown would also destroy the trainer's process groups; see `close`
        core = client.engine_core
        self._model = core.model_executor.driver_worker.get_model()
        self.sleep()

    def parameters(self) -> dict[str, Tensor]:
        """vLLM's live parameters of this rank, by vLLM name. Written in place; never rebound."""
        return {name: param.data for name, param in self._model.named_parameters()}

    def load_hf(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """vLLM's own loader: the oracle of the resharder's tests."""
        self._model.load_weights(tensors)

    @property
    def version(self) -> int | None:
        return self._version

    def begin_update(self) -> None:
        """Call before writing `parameters()`: a half-written engine does not generate."""
        self._version = None

    def weights_changed(self, version: int) -> None:
        """Call after writing `parameters()`: what the caches hold was computed with other weights."""
        if version != self._cached_version:
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM refused to drop its prefix cache: requests are still running")
            self._cached_version = version
        self._version = version

    def generate(self, prompts: Sequence[Prompt], embeds: Mapping[str, Tensor], sampling: Sampling) -> list[Completion]:
        """`sampling.num_samples` completions per prompt, in order of (prompt, sample)."""
        if self._version is None:
            raise RuntimeError("the engine holds no weights, or half of a sync; sync before generating")
        if sampling.weights_version not in (None, self._version):
            wanted = sampling.weights_version
            raise RuntimeError(f"the engine holds weights {self._version}, not {wanted}; sync before generating")
        requests = [self._engine_prompt(prompt, embeds) for prompt in prompts]
        params = [self._sampling_params(sampling, prompt.prompt_id) for prompt in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [c for prompt, output in zip(prompts, outputs, strict=True) for c in self._completions(prompt, output)]

    def sleep(self) -> None:
        if self._backend.engine_sleeps:
            self._llm.sleep(level=1)

    def wake(self, what: str) -> None:
        if self._backend.engine_sleeps:
            self._llm.wake_up(tags=[what])

    def close(self) -> None:
        """Free the engine and its own process groups, part by part."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self._llm.llm_engine.engine_core.engine_core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        destroy_model_parallel()
        del self._llm, self._model
        gc.unfreeze()
        gc.collect()
        self._backend.release_cache()

    def _sampling_params(self, sampling: Sampling, prompt_id: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.num_samples,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            seed=None if sampling.greedy else prompt_seed(sampling.seed, sampling.step, prompt_id),
            max_tokens=sampling.max_response_tokens,
            logprobs=0,
            logit_bias=self._bias,
            stop_token_ids=self._eos,
            detokenize=False,
        )

    def _completions(self, prompt: Prompt, output: Any) -> Iterator[Completion]:
        if tuple(output.prompt_token_ids) != prompt.token_ids:
            raise RuntimeError(_prompt_difference(prompt, output.prompt_token_ids))
        for choice in sorted(output.outputs, key=lambda c: c.index):
            ids = tuple(choice.token_ids)
            logprobs = tuple(step[token].logprob for step, token in zip(choice.logprobs, ids, strict=True))
            truncated = choice.finish_reason == "length"
            yield Completion(prompt.prompt_id, choice.index, ids, logprobs, self._detokenize(ids), truncated)


def prompt_seed(run_seed: int, step: int, prompt_id: int) -> int:
    """Seed of a prompt's requests (vLLM gives sample k this seed + k): no two prompts or steps share their noise, and a
    resumed run draws the same."""
    digest = hashlib.sha256(f"{run_seed}:{step}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _prompt_difference(prompt: Prompt, got: Sequence[int]) -> str:
    first = next(
        (i for i, (a, b) in enumerate(zip(prompt.token_ids, got, strict=False)) if a != b),
        min(len(prompt.token_ids), len(got)),
    )
    return (
        f"{prompt.row.source}: the engine saw another prompt than the trainer will score: {len(got)} tokens instead of "
        f"{len(prompt.token_ids)}, first difference at {first} ({list(got[first : first + 5])} instead of "
        f"{list(prompt.token_ids[first : first + 5])})"
    )


def _build(settings: EngineSettings, backend: Backend) -> Any:
    from vllm import LLM

    longest = 0 if backend.chunked_prefill else settings.max_model_len
    return LLM(
        model=settings.folder,
        tokenizer=settings.folder,
        load_format="dummy",
        dtype={torch.float32: "float32", torch.bfloat16: "bfloat16"}[backend.dtype],
        tensor_parallel_size=settings.tensor,
        distributed_executor_backend="external_launcher",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_seqs, longest, backend.prefill_tokens),
        block_size=backend.kv_block_size,
        enable_chunked_prefill=backend.chunked_prefill,
        kv_cache_memory_bytes=settings.kv_cache_bytes or None,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager,
        enable_sleep_mode=backend.engine_sleeps,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0, "video": 0},
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        seed=0,
    )


@contextmanager
def _launcher_environment() -> Iterator[None]:
    """vLLM overwrites torchrun's LOCAL_WORLD_SIZE with its tensor parallel size; give it back."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    yield
    if before is not None:
        os.environ["LOCAL_WORLD_SIZE"] = before


def inspect_models_in_process() -> None:
    """vLLM 0.32 inspects a model class in a fresh Python process, to keep CUDA out of its own.

    Ours holds the device anyway, and a fresh process would not have the declarations of define_torchvision_operators.
    """
    import vllm.model_executor.models.registry as registry

    define_torchvision_operators()
    registry._run_in_subprocess = lambda function: function()


def keep_cpu_linear_weights() -> None:
    """vLLM 0.32 on a CPU packs every linear weight away after loading and leaves an empty parameter: keep the live
    ones.

    Its own fallback, torch's linear on the live weight, sees in-place updates. Must run before the model is built.
    """
    import vllm.model_executor.layers.utils as layer_utils

    def read_live_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
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

    CPUUnquantizedExperts.process_weights_after_loading = leave_unpacked
    CPUUnquantizedExperts.apply = apply


@contextmanager
def private_shared_memory() -> Iterator[None]:
    """Give the shared memory of this engine's tensor parallel group a name of its own, and unlink it once all are in.

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
    with (
        mock.patch.object(_CPUSHMDistributed, "make_group_name", staticmethod(unique_name)),
        mock.patch.object(
            CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: agrees(self) and enough_cores
        ),
    ):
        yield
    dist.barrier()
    for path in Path("/dev/shm").glob(f"{token[0]}*"):
        path.unlink(missing_ok=True)


@contextmanager
def encoder_budget(num_tokens: int) -> Iterator[None]:
    """Let one video item be as long as the engine's context.

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
