# SPDX-License-Identifier: Apache-2.0
"""The derived size of the KV cache, by numbers made by hand."""

from __future__ import annotations

import os

import psutil
import pytest

from megatron_rl.rollout.kv_cache import cache_bytes
from megatron_rl.runtime.device import host_memory

ROOMY = 1 << 40


def test_every_sequence_gets_whole_blocks_and_vllm_one_of_its_own() -> None:
    # 100 tokens are 4 blocks of 32; 8 sequences and one block more; 64 bytes a token
    assert cache_bytes(64, 100, 8, 32, ROOMY) == (8 * 4 + 1) * 32 * 64


def test_a_smaller_machine_decodes_fewer_at_a_time() -> None:
    assert cache_bytes(64, 100, 8, 32, 20_000) == 20_000


def test_one_sequence_must_fit() -> None:
    exact = (4 + 1) * 32 * 64
    assert cache_bytes(64, 100, 8, 32, exact) == exact
    with pytest.raises(ValueError, match=r"^rollout.kv_cache_gib=0: one sequence of 100 tokens takes 0.00 GiB a rank"):
        cache_bytes(64, 100, 8, 32, exact - 1)


def test_host_memory_is_what_others_read() -> None:
    assert 0 < host_memory() <= psutil.virtual_memory().total
    assert psutil.virtual_memory().total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
