# SPDX-License-Identifier: Apache-2.0
"""Megatron-core 0.16.1 without a GPU: redirects the CUDA devices that it names in its source. Never active on CUDA.

Inside the scope, tensors asked for on a CUDA device are made on the CPU, `.cuda()` is the identity, and tensor type
*names* read as CUDA types (the distributed optimizer compares those). Costs one Python call per torch operation, so it
surrounds Megatron-core only, never vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    if isinstance(device, int):
        return True
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _NoStream:
    """Where there is one stream only, what its users ask of it is already so."""

    def wait_stream(self, other: _NoStream) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


@functools.cache
def _patches() -> tuple[tuple[object, str, object], ...]:
    import megatron.core.tensor_parallel.random as mcore_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(device: str = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def as_numpy_on_request(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    cuda, stream = torch.cuda, _NoStream()
    return (
        (cuda, "Stream", lambda *_: stream),
        (cuda, "current_stream", lambda *_: stream),
        (cuda, "stream", lambda _: nullcontext()),
        (moe_utils, "te_general_gemm", None),  # without Transformer Engine the name is used but not defined
        (token_dispatcher, "maybe_move_tensor_to_cpu", as_numpy_on_request),  # the original converts CUDA tensors only
        (cuda, "current_device", lambda: torch.device("cpu")),
        (cuda, "synchronize", lambda *_: None),
        (cuda, "set_device", lambda *_: None),
        (cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state)),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda, "initial_seed", torch.initial_seed),
        (mcore_random, "_set_cuda_rng_state", set_state),
        (mcore_random, "_get_cuda_rng_state", get_state),
    )


@contextmanager
def redirect_cuda_to_cpu() -> Iterator[None]:
    """Run the body with Megatron-core's CUDA calls redirected to the CPU; everything is undone on exit."""
    patchers = [mock.patch.object(owner, name, value, create=True) for owner, name, value in _patches()]
    for patcher in patchers:
        patcher.start()
    try:
        with _CudaToCpu():
            yield
    finally:
        for patcher in reversed(patchers):
            patcher.stop()
