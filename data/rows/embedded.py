# SPDX-License-Identifier: Apache-2.0
"""Media that lie in a data file itself, as Hugging Face's Parquet files keep images: {"bytes": ..., "path": ...}.

They are written out once, under the sha256 of their content, so that from here on every medium is a file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePath

from megatron_rl.runtime.files import write_atomically


def write_out(content: bytes, name: str, folder: Path) -> Path:
    """The file in `folder` that holds `content`.

    `name` is what the data file calls it, of which the suffix is kept.
    """
    path = folder / f"{hashlib.sha256(content).hexdigest()}{PurePath(name).suffix}"
    if path.exists():
        return path
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"run_dir={folder.parent}: media of the data set cannot be written there ({error})") from error
    return path
