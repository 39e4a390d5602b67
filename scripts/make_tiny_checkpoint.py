# SPDX-License-Identifier: Apache-2.0
"""Write a tiny Qwen2.5-VL checkpoint with random weights: `make_tiny_checkpoint.py OUT [--seed N]`.

transformers itself writes it, so the folder holds what a real one does: config, weights, tokenizer, chat template,
processor. The tokenizer is byte-level without merges: one token per byte, so any text round-trips.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from megatron_rl.runtime.device import define_torchvision_operators
from model_providers.qwen2_5_vl.tiny import tiny

define_torchvision_operators()

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 272  # 256 bytes + 8 specials, padded to a multiple of 16
PATCH = {"patch_size": 14, "temporal_patch_size": 2}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer: PreTrainedTokenizerFast, max_positions: int = 4096) -> Qwen2_5_VLConfig:
    ids = tokenizer.get_vocab()
    settings = tiny(VOCAB_SIZE)
    settings["text_config"]["max_position_embeddings"] = max_positions
    settings["text_config"] |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return Qwen2_5_VLConfig(
        **settings,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def make_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # zeros and ones, transformers' start values, would hide a wrongly loaded vector
                parameter.copy_(("norm" in name) + 0.1 * torch.randn(parameter.shape))
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, merge_size=2, **PATCH),
        video_processor=Qwen2VLVideoProcessor(size=size, merge_size=2, min_frames=2, max_frames=16, **PATCH),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def write_checkpoint(out: Path, seed: int, max_positions: int = 4096) -> None:
    """Fill a temporary folder and rename it: `out` is never half written, and never mixed with an older one."""
    tokenizer = make_tokenizer()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        make_model(make_config(tokenizer, max_positions), seed).save_pretrained(scratch)
        processor = make_processor(tokenizer)
        processor.save_pretrained(scratch)
        processor.image_processor.save_pretrained(scratch)  # preprocessor_config.json, as published checkpoints have
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen2.5-VL checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write; replaced if it holds a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    args = parser.parse_args()
    if args.out.exists() and not (args.out / "config.json").is_file():
        parser.error(f"{args.out}: exists and is no checkpoint folder; give another place")
    write_checkpoint(args.out, args.seed)
    print(f"{args.out}: tiny Qwen2.5-VL, seed {args.seed}")


if __name__ == "__main__":
    main()
