# SPDX-License-Identifier: Apache-2.0
"""vLLM in process, one engine per rollout replica.

torchrun's ranks form the engine's tensor parallel groups (`external_launcher`); every rank of a replica makes the same
calls and sees the same tokens. The engine holds the language model only; media arrive as embeddings (requests.py), and
its live parameters are written in place by the resharder.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from megatron_rl.protocols import PositionRule
from megatron_rl.rollout import vllm_adaptations as adaptations
from megatron_rl.rollout.requests import engine_input
from megatron_rl.runtime.device import Backend
from megatron_rl.types import FORBIDDEN_BIAS, Completion, EncodedMedia, EngineModel, Prompt, Sampling

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.logprobs import Logprob

NO_MEDIA = {"image": 0, "video": 0, "audio": 0}  # of a request for vLLM's own encoders: it builds none


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How one replica is built. `kv_cache_bytes` 0 = vLLM takes its share of `gpu_memory_utilization`."""

    model: EngineModel
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
        position_ids: PositionRule,
        detokenize: Callable[[Sequence[int]], str],
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self._backend, self._position_ids, self._detokenize = backend, position_ids, detokenize
        self._bias = dict.fromkeys(forbidden_tokens, FORBIDDEN_BIAS)
        self._eos = list(eos_token_ids)
        self._version: int | None = None
        self._cached_version: int | None = None
        self._num_requests = 0
        if not backend.engine_owns_weights:
            adaptations.keep_cpu_linear_weights()
            adaptations.keep_cpu_expert_weights()
        adaptations.inspect_models_in_process()
        with (
            adaptations.launcher_environment(),
            torch.random.fork_rng(),
            adaptations.encoder_budget(settings.max_model_len),
            adaptations.private_shared_memory(),
            adaptations.deepstack_without_encoder() if settings.model.deepstack_levels else nullcontext(),
        ):
            self._llm = _build(settings, backend)
        client: Any = self._llm.llm_engine.engine_core  # vLLM's in-process client, whose parts it does not type
        client._finalizer.detach()  # vLLM's own shutdown would also destroy the trainer's process groups; see `close`
        self._core = client.engine_core
        self._model = self._core.model_executor.driver_worker.get_model()
        adaptations.take_given_media(self._model)
        if settings.model.positions == "mrope":
            adaptations.take_given_positions(self._model)
        self.sleep()

    def parameters(self) -> dict[str, Tensor]:
        """vLLM's live parameters of this rank, by vLLM name, each of the shape of its shard. Written in place; never
        rebound."""
        return {name: param.data for name, param in self._model.named_parameters()}

    def load_hf(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """vLLM's own loader, of whole tensors by Hugging Face name: what the resharder's tests compare with."""
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

    def generate(self, prompts: Sequence[Prompt], media: EncodedMedia, sampling: Sampling) -> list[Completion]:
        """`sampling.num_samples` completions per prompt, in order of (prompt, sample)."""
        if self._version is None:
            raise RuntimeError("the engine holds no weights, or half of a sync; sync before generating")
        if sampling.weights_version not in (None, self._version):
            wanted = sampling.weights_version
            raise RuntimeError(f"the engine holds weights {self._version}, not {wanted}; sync before generating")
        outputs = self._run(prompts, media, sampling)
        return [c for prompt, output in zip(prompts, outputs, strict=True) for c in self._completions(prompt, output)]

    def _run(self, prompts: Sequence[Prompt], media: EncodedMedia, sampling: Sampling) -> list[RequestOutput]:
        """One finished request for each prompt. None is left in the engine, whatever happens."""
        engine = self._llm.llm_engine
        finished: dict[str, Any] = {}  # step() may give outputs of embedding models, which this is not
        names: list[str] = []
        given: list[str] = []
        try:
            for prompt in prompts:
                names.append(str(self._num_requests))
                self._num_requests += 1
                params = self._sampling_params(sampling, prompt.prompt_id)
                given.append(engine.add_request(names[-1], engine_input(prompt, media, self._position_ids), params))
            while engine.has_unfinished_requests():
                finished |= {output.request_id: output for output in engine.step() if output.finished}
        finally:
            if len(finished) < len(given):
                engine.abort_request(given, internal=True)
        return [finished[name] for name in names]

    def sleep(self) -> None:
        if self._backend.engine_sleeps:
            self._llm.sleep(level=1)

    def wake(self, what: str) -> None:
        if self._backend.engine_sleeps:
            self._llm.wake_up(tags=[what])

    def close(self) -> None:
        """Free the engine and its own process groups, part by part."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self._core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        destroy_model_parallel()
        del core, self._core, self._llm, self._model
        gc.unfreeze()
        gc.collect()
        self._backend.release_cache()

    def _sampling_params(self, sampling: Sampling, prompt_id: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.num_samples,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            seed=None if sampling.greedy else prompt_seed(sampling.seed, sampling.step, prompt_id),
            max_tokens=sampling.max_response_tokens,
            logprobs=0,
            logit_bias=self._bias,
            stop_token_ids=self._eos,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completions(self, prompt: Prompt, output: RequestOutput) -> Iterator[Completion]:
        seen = output.prompt_token_ids or []
        if tuple(seen) != prompt.token_ids:
            raise RuntimeError(_prompt_difference(prompt, seen))
        for choice in sorted(output.outputs, key=lambda c: c.index):
            ids = tuple(choice.token_ids)
            by_token = cast("list[dict[int, Logprob]]", choice.logprobs)  # asked for, and not flat
            logprobs = tuple(step[token].logprob for step, token in zip(by_token, ids, strict=True))
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


def _build(settings: EngineSettings, backend: Backend) -> LLM:
    from vllm import LLM

    model = settings.model
    overrides = dict(model.overrides) | ({"architectures": [model.architecture]} if model.architecture else {})
    dtypes: dict[torch.dtype, Literal["float32", "bfloat16"]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    longest = 0 if backend.chunked_prefill else settings.max_model_len
    return LLM(
        model=model.folder,
        tokenizer=model.folder,
        hf_overrides=overrides,
        load_format="dummy",
        dtype=dtypes[backend.dtype],
        tensor_parallel_size=settings.tensor,
        distributed_executor_backend="external_launcher",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_seqs, longest, backend.prefill_tokens),
        block_size=backend.kv_block_size,
        enable_chunked_prefill=backend.chunked_prefill,
        kv_cache_memory_bytes=settings.kv_cache_bytes or None,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager or not backend.engine_compiles,
        enable_sleep_mode=backend.engine_sleeps,
        enable_mm_embeds=True,
        limit_mm_per_prompt=NO_MEDIA,
        mm_processor_cache_gb=0,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        seed=0,
    )
