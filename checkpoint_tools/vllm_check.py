# SPDX-License-Identifier: Apache-2.0
"""Lets stock vLLM read a folder from disk, which the rollout engine never does: its weights come from the trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

KV_CACHE_BYTES = 64 << 20


def generate_greedily(folder: Path, prompt_ids: Sequence[int], num_tokens: int, forbidden: Sequence[int]) -> list[int]:
    """The likeliest continuation in fp32, text only, on one device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    length = len(prompt_ids) + num_tokens
    engine = LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=length,
        max_num_batched_tokens=length,
        max_num_seqs=1,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
        enforce_eager=True,
        seed=0,
    )
    bias = dict.fromkeys(forbidden, -100.0)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logit_bias=bias, detokenize=False
    )
    try:
        output = engine.generate([TokensPrompt(prompt_token_ids=list(prompt_ids))], sampling, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()  # and with it the process group that vLLM made
    return list(output[0].outputs[0].token_ids)
