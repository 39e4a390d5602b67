# SPDX-License-Identifier: Apache-2.0
"""Media that lie in a data file itself, as Hugging Face's Parquet files keep images: {"bytes": ..., "path": ...}.

They are written out once, under the sha256 of their content, so that from here on every medium is a file.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path, PurePath


def write_out(content: bytes, name: str, folder: Path) -> Path:
    """The file in `folder` that holds `content`; it is there complete or not at all, whoever else writes it meanwhile.

    `name` is what the data file calls it, of which the suffix is kept.
    """
    path = folder / f"{hashlib.sha256(content).hexdigest()}{PurePath(name).suffix}"
    if path.exists():
        return path
    scratch = folder / f".{uuid.uuid4().hex}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ValueError(f"run_dir={folder.parent}: media of the data set cannot be written there ({error})") from error
    return path
