# SPDX-License-Identifier: Apache-2.0
"""The only module that knows on which device we run. Everything else reads a `Backend`, a frozen record of choices."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_rl.runtime.chunks import GPU_PREFILL_TOKENS
from megatron_rl.runtime.mcore_on_cpu import redirect_cuda_to_cpu


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between a GPU box and a laptop, decided once."""

    device: Literal["cpu", "cuda"]
    process_group: str
    dtype: torch.dtype
    layer_spec: Literal["local", "transformer_engine"]
    fused_kernels: bool
    attention_kernel: Literal["aten_cpu", "aten_cuda", "flash_attn"]
    optimizer: Literal["adamw", "fused"]
    decoder_device: Literal["cpu", "gpu"]
    engine_sleeps: bool
    engine_owns_weights: bool
    chunked_prefill: bool
    """vLLM takes a seeded request's noise back after each chunk of its prompt, which only CUDA generators can do."""
    prefill_tokens: int
    """Prompt tokens that vLLM prefills at a time; where it does not chunk, a longer prompt alone."""
    engine_compiles: bool
    """Whether compiling the engine's model gains anything over running it as it is."""
    measures_kv_cache: bool
    """Whether vLLM measures what its KV cache may take; else every rank would take a part of the host's memory."""
    kv_block_size: int | None
    """Tokens of a block of vLLM's KV cache; only whole blocks of a prompt are shared. None: vLLM's own choice."""
    mcore_scope: Callable[[], AbstractContextManager[None]]

    def local_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", local_rank)

    def bound_device(self, local_rank: int) -> torch.device | None:
        """The device that the process group is bound to, which vLLM asks for when it splits groups; none on a CPU."""
        return None if self.device == "cpu" else self.local_device(local_rank)

    def set_device(self, local_rank: int) -> None:
        if self.device == "cuda":
            torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def release_cache(self) -> None:
        """Hand freed blocks back to the device, so that the other half of the process can have them."""
        if self.device == "cuda":
            torch.cuda.empty_cache()


def choose_backend(device: str = "auto", dtype: str = "auto") -> Backend:
    """The backend for `device` (auto, cpu, cuda) and `dtype` (auto, float32, bfloat16)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device=cuda: torch sees no GPU; use device=cpu or check the driver and CUDA_VISIBLE_DEVICES"
            )
        if dtype == "float32":
            raise ValueError(
                "model.dtype=float32: flash attention has no such kernel on a GPU; use bfloat16, or device=cpu"
            )
        return Backend(
            device="cuda",
            process_group="cpu:gloo,cuda:nccl",
            dtype=torch.bfloat16,
            layer_spec="transformer_engine",
            fused_kernels=True,
            attention_kernel="flash_attn" if importlib.util.find_spec("flash_attn") else "aten_cuda",
            optimizer="fused",
            decoder_device="gpu",
            engine_sleeps=True,
            engine_owns_weights=True,
            chunked_prefill=True,
            prefill_tokens=GPU_PREFILL_TOKENS,
            engine_compiles=True,
            measures_kv_cache=True,
            kv_block_size=None,
            mcore_scope=nullcontext,
        )
    return Backend(
        device="cpu",
        process_group="gloo",
        dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        layer_spec="local",
        fused_kernels=False,
        attention_kernel="aten_cpu",
        optimizer="adamw",
        decoder_device="cpu",
        engine_sleeps=False,
        engine_owns_weights=False,
        chunked_prefill=False,
        prefill_tokens=16384,
        engine_compiles=False,
        measures_kv_cache=False,
        kv_block_size=32,  # vLLM's 128 would compute up to 127 tokens of a prompt once per response
        mcore_scope=redirect_cuda_to_cpu,
    )


def host_memory() -> int:
    """Bytes of memory that the processes of this machine (or container) may use together."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    stated = limit.read_text().strip() if limit.is_file() else "max"
    return physical if stated == "max" else min(physical, int(stated))


def define_torchvision_operators() -> None:
    """Let `import torchvision` succeed where its compiled half cannot load (the PyPI wheel beside a CPU build of
    torch).

    torchvision registers fake kernels for `nms` and `qnms` at import and fails if the operators do not exist. Declaring
    them first, in this process, is enough for transformers' video processors. Where the compiled half loads,
    nothing is done.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue  # linked against CUDA libraries that are not here
    fragment = torch.library.Library("torchvision", "DEF")
    fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEEP_ALIVE.append(fragment)


_KEEP_ALIVE: list[torch.library.Library] = []  # a Library undoes its definitions when it is collected
