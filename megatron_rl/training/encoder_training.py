# SPDX-License-Identifier: Apache-2.0
"""The trained media encoder in Megatron-core's terms: its own DDP and distributed optimizer, over all ranks.

Every rank holds the whole encoder and encodes other frames, whatever its place in the language model's grid. So for
the encoder all ranks are data parallel: gradients are summed over the world, and each rank keeps a part of the
optimizer state. Norm, clipping and the scale of the gradient are those of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rl.protocols import MediaEncoder


class EncoderTraining:
    """Gradient buffers and optimizer of an encoder; created inside the backend's scope."""

    def __init__(
        self,
        media_encoder: MediaEncoder,
        config: TransformerConfig,
        ddp: DistributedDataParallelConfig,
        optimizer: OptimizerConfig,
    ):
        groups = _all_ranks_are_data_parallel()
        self._media_encoder = media_encoder
        self.ddp = DistributedDataParallel(config, ddp, media_encoder.module, pg_collection=groups)
        self.optimizers = get_megatron_optimizer(
            optimizer, [self.ddp], use_gloo_process_groups=False, pg_collection=groups
        ).chained_optimizers

    def join(self, language: ChainedOptimizer) -> ChainedOptimizer:
        """One optimizer over both: one norm, one clipping, one step. Collective.

        A language model that is frozen on all ranks has none: Megatron-core's stand-in for it cannot be saved.
        """
        is_trained = torch.tensor([float(not language.is_stub_optimizer)])
        dist.all_reduce(is_trained)
        return ChainedOptimizer([*(language.chained_optimizers if is_trained else ()), *self.optimizers])

    def finish_gradients(self, num_tokens: Tensor) -> None:
        """Sum over all ranks and divide by the tokens of the whole update, which `num_tokens` [] holds."""
        self.ddp.finish_grad_sync()
        if num_tokens > 0:
            self.ddp.scale_gradients(1.0 / num_tokens)

    def stepped(self) -> None:
        """The optimizer has changed the weights."""
        self._media_encoder.version += 1


def encoder_state(media_encoder: MediaEncoder) -> dict[str, ShardedTensor]:
    """The encoder for Megatron-core's checkpoints, each tensor under its Hugging Face name; rank 0 writes it."""
    replica = (0, 0, dist.get_rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, param, replica_id=replica)
        for name, param in media_encoder.named_weights().items()
    }


@torch.no_grad()
def load_encoder_state(media_encoder: MediaEncoder, loaded: dict[str, Any]) -> None:
    """Fill the encoder with what a checkpoint gave for `encoder_state`."""
    for name, param in media_encoder.named_weights().items():
        param.copy_(loaded[name])
    media_encoder.is_original = False
    media_encoder.version += 1


def _all_ranks_are_data_parallel() -> ProcessGroupCollection:
    everyone, alone = dist.group.WORLD, dist.new_subgroups(group_size=1)[0]
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = groups.expt_dp = groups.intra_dist_opt = everyone
    groups.tp = groups.pp = groups.ep = groups.mp = groups.tp_ep_pp = alone
    return groups
