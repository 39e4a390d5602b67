# SPDX-License-Identifier: Apache-2.0
"""The part of a Hugging Face checkpoint that training does not change: config, tokenizer, processor, vision tower."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from model_providers.hf_checkpoint import HfCheckpoint
from model_providers.hf_files import INDEX_FILE
from model_providers.provider import open_provider

FROZEN_FILE = "frozen.safetensors"


def copy_frozen_parts(source: Path, target: Path) -> None:
    """Copy every small file of `source` and all tensors outside the weight table (under their HF names) to `target`.

    `source` may be such a folder itself; then it is copied as it is.
    """
    if (source / FROZEN_FILE).is_file():
        shutil.copytree(source, target)
        return
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name != INDEX_FILE:
            shutil.copy2(path, target / path.name)
    checkpoint = HfCheckpoint(source)
    trained = open_provider(source).weight_map.hf_tensors()
    frozen = {name: checkpoint.tensor(name) for name in checkpoint.names() if name not in trained}
    save_file(frozen, target / FROZEN_FILE, metadata={"format": "pt"})
