# SPDX-License-Identifier: Apache-2.0
"""The trained language model: Megatron-core's DDP, distributed optimizer and pipeline schedules in three methods.

`logprobs` scores micro-batches, `train` makes one optimizer update, `offloaded` frees gradients and optimizer state
while the engine works; the state stays in host memory until the optimizer's step, when activations are freed. A
`Reference` holds a second set of weights in host memory. All of them are collective calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.protocols import MediaEncoder, PolicyLoss
from megatron_rl.runtime.device import Backend
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.batch import ScoredBatch
from megatron_rl.training.encoder_training import EncoderTraining
from megatron_rl.training.microbatch import MicroBatch, gather_embeds
from megatron_rl.training.optimizer import install_group_step_adamw
from megatron_rl.types import LossInputs
from model_providers.attention.core import BatchLayout
from model_providers.transformer import ChunkedStage, LanguageModel

REFERENCE_VERSION = -1  # of an encoder that holds the reference's weights


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Of the optimizer; the learning rate of step k is lr * min(1, (k + 1) / warmup_steps)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    offload: bool = False
    """Optimizer state goes back to host memory after every step; else it stays until the engine works."""

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr


class Policy:
    """Owns the model of this rank. `version` counts optimizer updates; the resharder syncs by it."""

    def __init__(
        self,
        model: LanguageModel | ChunkedStage,
        backend: Backend,
        mesh: ParallelMesh,
        hyper: Hyperparameters,
        media_encoder: MediaEncoder | None = None,
    ):
        self.backend, self.mesh, self.hyper = backend, mesh, hyper
        self.language_model, self.media_encoder = model, media_encoder
        self.device = next(model.parameters()).device
        self.version = 0
        if backend.optimizer == "adamw":
            install_group_step_adamw()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # see _check_gradient
        )
        with backend.mcore_scope():
            chunks = list(model) if isinstance(model, ChunkedStage) else [model]
            self.chunks = [DistributedDataParallel(model.config, ddp, chunk) for chunk in chunks]
            settings = _optimizer_config(hyper, backend)
            self.optimizer = get_megatron_optimizer(settings, self.chunks)
            self.encoder_training: EncoderTraining | None = None
            if media_encoder is not None and media_encoder.is_trained:
                self.encoder_training = EncoderTraining(media_encoder, model.config, ddp, settings)
                self.optimizer = self.encoder_training.join(self.optimizer)
            self._offload_between_steps()
        self._backward_media: Callable[[], None] | None = None
        model.config.finalize_model_grads_func = self._finalize
        model.config.grad_scale_func = self.optimizer.scale_loss
        self._forward_backward = get_forward_backward_func()

    def logprobs(self, batches: Sequence[MicroBatch], embeds: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Log-probability [R] of every response token of every micro-batch; None except on the last pipeline stage."""
        with torch.no_grad():
            outputs = self._run(batches, embeds, _keep_output, forward_only=True)
        return outputs if self.mesh.is_last_stage else [None] * len(batches)

    def train(
        self,
        batches: Sequence[ScoredBatch],
        embeds: Mapping[str, Tensor],
        loss: PolicyLoss,
        step: int,
        backward_media: Callable[[], None] | None = None,
    ) -> dict[str, tuple[float, float]]:
        """One update. Where the tower is trained, `backward_media` takes the gradients of `embeds` through it.

        Returns local sums {metric: (numerator, denominator)}; those of the optimizer have
        denominator 1. Raises ValueError where the gradient is not finite, with the weights as they were."""
        assert self.encoder_training is None or backward_media is not None, "a trained tower must get its gradients"
        self._backward_media = backward_media
        for part in self._ddp_parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = self.hyper.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        outputs = self._run([b.batch for b in batches], embeds, partial(_loss, loss, batches), forward_only=False)
        with self.optimizer_on_device():
            self._check_gradient(step)
            updated, grad_norm, _ = self.optimizer.step()
        assert updated, "only a loss scaler refuses an update, and there is none"
        self.version += 1
        if self.encoder_training is not None:
            self.encoder_training.stepped()
        metrics: dict[str, tuple[float, float]] = {"actor/grad_norm": (float(grad_norm), 1.0), "actor/lr": (lr, 1.0)}
        if self.mesh.is_last_stage and self.mesh.here.tp == 0:
            metrics |= _sum_metrics(outputs)
        return metrics

    def _check_gradient(self, step: int) -> None:
        """Raise ValueError, on all ranks alike, before a gradient that is not finite reaches the weights.

        Megatron-core's own check names a bucket of one rank; its optimizer looks only where it scales the loss.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise ValueError(
                f"train.optimizer.lr={self.hyper.lr}: step {step + 1}: gradient norm {norm} is not finite; lower the "
                "learning rate, or warm up (train.optimizer.warmup_steps); the weights are those before this update"
            )

    @property
    def _ddp_parts(self) -> list[DistributedDataParallel]:
        return [*self.chunks, *([self.encoder_training.ddp] if self.encoder_training is not None else [])]

    def _finalize(
        self,
        model: list[Any],
        num_tokens: Tensor,
        pg_collection: Any = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Called by the schedule after its last backward pass: the encoder's backward pass, then all reductions."""
        if self.encoder_training is None:
            finalize_model_grads(model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
            return
        assert self._backward_media is not None
        self._backward_media()
        # Leaves in num_tokens the tokens of all ranks.
        finalize_model_grads(model, num_tokens, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        self.encoder_training.finish_gradients(num_tokens)

    def _run(
        self, batches: Sequence[MicroBatch], embeds: Mapping[str, Tensor], loss_func: Any, forward_only: bool
    ) -> list[Any]:
        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, Any]:
            index, batch = next(iterator)
            output = model(
                input_ids=batch.token_ids[None].to(self.device),
                position_ids=batch.position_ids[:, None].to(self.device),
                attention_mask=None,
                packed_seq_params=self._layout(batch, embeds),
            )
            return output, partial(loss_func, index)

        for chunk in self.chunks:
            chunk.train()
        with self.backend.mcore_scope():
            return self._forward_backward(
                forward_step_func=forward_step,
                data_iterator=[enumerate(batches) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=1,  # unused: variable_seq_lengths makes the stages exchange shapes
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _layout(self, batch: MicroBatch, embeds: Mapping[str, Tensor]) -> BatchLayout:
        layout = BatchLayout(
            attention=batch.attention,
            last_attention=batch.last_attention,
            predicting_rows=batch.predicting_rows.to(self.device),
            predictors=batch.predictors.to(self.device),
            targets=batch.targets.to(self.device),
        )
        gathered = gather_embeds(batch, embeds) if self.mesh.is_first_stage else None
        if gathered is not None:
            layout.media_rows = batch.media_rows.to(self.device)
            layout.media_embeds = gathered.to(self.device)
        return layout

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Gradient buffers freed for the length of the block, optimizer state in host memory until it is needed."""
        try:
            with self.backend.mcore_scope():
                for part in self._ddp_parts:
                    part.offload_grad_buffers()
                self.optimizer.offload_to_cpu()
            yield
        finally:
            with self.backend.mcore_scope():
                for part in self._ddp_parts:
                    part.restore_grad_buffers()

    @contextmanager
    def optimizer_on_device(self) -> Iterator[None]:
        """Optimizer state on the device inside the block, which runs in Megatron-core's scope: for its step, and for
        checkpoints."""
        with self.backend.mcore_scope():
            self.optimizer.restore_from_cpu()  # what is there already stays
            try:
                yield
            finally:
                self._offload_between_steps()

    def _offload_between_steps(self) -> None:
        if self.hyper.offload:
            self.optimizer.offload_to_cpu()


class Reference:
    """A frozen copy of the policy's weights, kept in host memory: one shard per rank, in the model's dtype."""

    def __init__(self, policy: Policy):
        self._media_encoder = policy.media_encoder if policy.encoder_training is not None else None
        encoder_params = self._media_encoder.module.parameters() if self._media_encoder is not None else ()
        self._params = [*policy.language_model.parameters(), *encoder_params]
        self._weights = [p.detach().to("cpu", copy=True) for p in self._params]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The policy's model computes with the reference weights inside the block; its own come back bit for bit."""
        own = [p.detach().to("cpu", copy=True) for p in self._params]
        version = self._set_encoder_version(REFERENCE_VERSION)
        self._write(self._weights)
        try:
            yield
        finally:
            self._write(own)
            self._set_encoder_version(version)

    def _set_encoder_version(self, version: int) -> int:
        """Say which weights the encoder holds; returns what it was."""
        if self._media_encoder is None:
            return 0
        before, self._media_encoder.version = self._media_encoder.version, version
        return before

    @torch.no_grad()
    def _write(self, weights: Sequence[Tensor]) -> None:
        for param, weight in zip(self._params, weights, strict=True):
            param.copy_(weight)


def _optimizer_config(hyper: Hyperparameters, backend: Backend) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        adam_beta1=hyper.betas[0],
        adam_beta2=hyper.betas[1],
        adam_eps=hyper.eps,
        clip_grad=hyper.max_grad_norm,
        bf16=backend.dtype == torch.bfloat16,
        params_dtype=backend.dtype,
        use_distributed_optimizer=True,
    )


def _keep_output(index: int, output: Tensor, non_loss_data: bool = True) -> Tensor:
    return output.detach()


def _loss(loss: PolicyLoss, batches: Sequence[ScoredBatch], index: int, logprobs: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Megatron-core's contract with calculate_per_token_loss: (loss sum, token count, what to report)."""
    scored = batches[index]
    device = logprobs.device
    output = loss(
        LossInputs(
            logprobs=logprobs,
            old_logprobs=scored.old_logprobs if scored.old_logprobs is not None else logprobs.detach(),
            ref_logprobs=scored.ref_logprobs,
            rollout_logprobs=scored.batch.rollout_logprobs.to(device),
            advantages=_on_device(scored.advantages, device, like=logprobs),
            weights=scored.batch.weights.to(device),
        )
    )
    num_tokens = torch.tensor(scored.batch.num_response_tokens, dtype=torch.int, device=device)
    return output.loss_sum, num_tokens, output.metrics


def _on_device(advantages: Tensor | None, device: torch.device, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if advantages is None else advantages.to(device)


def _sum_metrics(outputs: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[float, float]]:
    totals: dict[str, tuple[float, float]] = {}
    for metrics in outputs:
        for name, (numerator, denominator) in metrics.items():
            top, bottom = totals.get(name, (0.0, 0.0))
            totals[name] = (top + float(numerator), bottom + float(denominator))
    return totals
