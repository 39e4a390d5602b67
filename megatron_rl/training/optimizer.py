# SPDX-License-Identifier: Apache-2.0
"""AdamW for the CPU with the state format of the fused GPU optimizers, so that both devices write one kind of
checkpoint.

torch's AdamW keeps a `step` tensor per parameter. Megatron-core's distributed optimizer, written for FusedAdam, then
shares one such tensor among all parameters after loading (so that it advances once per parameter) and cannot load it at
another layout. Here `step` is an integer of the parameter group and the state holds exp_avg and exp_avg_sq only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); the constructor takes what Megatron-core passes to
    FusedAdam."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
    ):
        assert adam_w_mode, "only decoupled weight decay is built"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self._state_of(p) for p in params]
        first = [s["exp_avg"] for s in states]
        second = [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def install_group_step_adamw() -> None:
    """Make Megatron-core 0.16.1 build GroupStepAdamW where it finds neither Transformer Engine nor Apex."""
    import megatron.core.optimizer as mcore_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    mcore_optimizer.Adam = GroupStepAdamW
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = GroupStepAdamW
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True
