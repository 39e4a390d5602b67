# SPDX-License-Identifier: Apache-2.0
"""How large vLLM's KV cache must be. Imports no torch."""

from __future__ import annotations

import math

from model_providers.shape import TransformerShape


def kv_bytes(shape: TransformerShape, tensor: int, element: int) -> int:
    """A token's keys and values in all layers of one rank."""
    return shape.num_layers * 2 * max(1, shape.num_groups // tensor) * shape.head_dim * element


def cache_bytes(per_token: int, max_model_len: int, max_num_seqs: int, block: int, available: int) -> int:
    """What `max_num_seqs` sequences of `max_model_len` tokens take in blocks of `block` tokens, or `available` bytes
    where that is less: vLLM then decodes fewer at a time.

    Raises ValueError where not even one sequence fits.
    """
    per_sequence = math.ceil(max_model_len / block) * block * per_token
    spare = block * per_token  # vLLM keeps one block for itself
    if available < per_sequence + spare:
        raise ValueError(
            f"rollout.kv_cache_gib=0: one sequence of {max_model_len} tokens takes {per_sequence / 2**30:.2f} GiB a "
            f"rank, and {available / 2**30:.2f} GiB are its share of this machine's memory "
            "(rollout.gpu_memory_utilization over the ranks); lower rollout.max_model_len or data.max_prompt_tokens, "
            "raise rollout.tensor, or set rollout.kv_cache_gib yourself"
        )
    return min(max_num_seqs * per_sequence + spare, available)
