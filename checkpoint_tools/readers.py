# SPDX-License-Identifier: Apache-2.0
"""What other programs make of an exported folder: transformers opens it, vLLM generates from it, our model agrees."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.runtime.device import choose_backend, define_torchvision_operators
from megatron_rl.types import FORBIDDEN_BIAS
from model_providers.provider import open_provider

NUM_TOP = 8  # likeliest tokens at each position whose log-probabilities are compared, beside the prompt's own
NUM_GENERATED = 16


def problems_in_transformers(folder: Path, prompt: str) -> list[str]:
    """What transformers has to say against the folder; empty if it opens, all tensors used and none missing."""
    _, info = _open_model(folder, "auto")
    kinds = {"missing_keys": "misses", "unexpected_keys": "does not know", "mismatched_keys": "finds misshapen"}
    found = [f"transformers {verb} {sorted(map(str, info[kind]))}" for kind, verb in kinds.items() if info[kind]]
    if not _tokenize(folder, prompt):
        found.append(f"the tokenizer makes no token of {prompt!r}")
    return found


@torch.no_grad()
def problems_in_vllm(folder: Path, prompt: str) -> list[str]:
    """vLLM loads the folder and must generate, greedily and in fp32, the tokens that transformers finds likeliest."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("--open-in=vllm: vLLM is not installed; install it, or leave vllm out")
    from checkpoint_tools.vllm_check import generate_greedily

    forbidden = open_provider(folder).forbidden_tokens
    ids = _tokenize(folder, prompt)
    try:
        generated = generate_greedily(folder, ids, NUM_GENERATED, forbidden)
    except (RuntimeError, ValueError, KeyError) as error:
        return [f"vLLM does not load it: {error}"]
    logits = _logits(folder, [*ids, *generated], forbidden)
    expected = logits[len(ids) - 1 : -1].argmax(-1).tolist()
    return [] if generated == expected else [f"vLLM generates {generated}, transformers {expected}"]


@torch.no_grad()
def logprob_gap(hf: Path, mcore: Path, prompt: str) -> float:
    """Largest difference between transformers' and our log-probabilities in fp32, for prompt and likeliest tokens."""
    provider = open_provider(hf)
    ids = _tokenize(hf, prompt)
    theirs = _logits(hf, ids, provider.forbidden_tokens)[:-1].log_softmax(-1)
    targets = torch.cat([torch.tensor(ids[1:])[:, None], theirs.topk(min(NUM_TOP, theirs.shape[-1])).indices], dim=1)
    ours = _our_logprobs(mcore, ids, targets)
    return float((ours - theirs.gather(1, targets)).abs().max())


def _our_logprobs(folder: Path, ids: Sequence[int], targets: Tensor) -> Tensor:
    """Log-probabilities of `targets` [positions, choices] by the Megatron model that `folder` is loaded into."""
    from megatron.core import dist_checkpointing

    from model_providers.attention.core import BatchLayout
    from model_providers.attention.segments import plan_one_sequence

    backend = choose_backend("cpu", "float32")
    provider = open_provider(folder / "hf")
    with _world_of_one(backend) as mesh:
        model = provider.build_language(backend, mesh)
        with backend.mcore_scope():
            loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
            model.load_state_dict(loaded["model"])
        num_asking, num_choices = targets.shape
        output = model(
            input_ids=torch.tensor([ids]),
            position_ids=provider.position_ids(len(ids), (), ())[:, None],
            attention_mask=None,
            packed_seq_params=BatchLayout(
                attention=plan_one_sequence(len(ids)),
                last_attention=plan_one_sequence(len(ids), [(0, num_asking)]),
                predicting_rows=torch.arange(num_asking),
                predictors=torch.arange(num_asking).repeat_interleave(num_choices),
                targets=targets.flatten(),
            ),
        )
    return output.view_as(targets)


@contextmanager
def _world_of_one(backend: Any) -> Iterator[Any]:
    from megatron_rl.runtime import parallel
    from megatron_rl.runtime.grid import Grid

    with mock.patch.dict(os.environ):
        dist.init_process_group(backend.process_group, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield parallel.initialize(backend, Grid(1), Grid(1))
        finally:
            parallel.shut_down()


def _logits(folder: Path, ids: Sequence[int], forbidden: Sequence[int]) -> Tensor:
    """transformers' logits [tokens, vocabulary] in fp32, with the bias on placeholder tokens that our model adds."""
    model, _ = _open_model(folder, torch.float32)
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    logits[:, list(forbidden)] += FORBIDDEN_BIAS
    return logits


def _open_model(folder: Path, dtype: torch.dtype | str) -> tuple[Any, dict[str, Any]]:
    define_torchvision_operators()
    import transformers

    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(f"{folder}/config.json: architectures={names}: transformers has no such class; correct it")
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return model.eval(), info


def _tokenize(folder: Path, prompt: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)(prompt)["input_ids"]
