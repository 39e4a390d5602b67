# SPDX-License-Identifier: Apache-2.0
"""Environment of the whole test suite, and the imports that forked worlds share."""

from __future__ import annotations

import os

# Before anything imports torch or vLLM: both read these once. One thread also keeps a forked OpenMP from dead-locking.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    WANDB_MODE="offline",
)

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def heavy_imports() -> None:
    """Import Megatron-core, transformers' Qwen2.5-VL and vLLM once; worlds forked afterwards have them for nothing."""
    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()
    import megatron.core.models.gpt
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    from vllm import LLM

    assert megatron.core.models.gpt and transformers and LLM


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint folder with random weights and untied embeddings. Read only."""
    from scripts.make_tiny_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_checkpoint`, with one matrix for embedding and output; weights, config and tokenizer only. Read only."""
    from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "tied"
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    make_model(config, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's data in small: 8 training, 4 held-out videos, three jsonl files. Read only."""
    from scripts.make_videos import make_dataset

    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, num_train=8, num_eval=4, seed=0)
    return folder
