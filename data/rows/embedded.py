# SPDX-License-Identifier: Apache-2.0
"""Media that lie in a data file itself, as Hugging Face's Parquet files keep images: {"bytes": ..., "path": ...}.

They are written out once, under the sha256 of their content, so that from here on every medium is a file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePath

from megatron_rl.runtime.files import write_atomically

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


def write_out(content: bytes, name: str, folder: Path) -> Path:
    """The file in `folder` that holds `content`.

    `name` is what the data file calls it, of which the suffix is kept if it looks like one.
    """
    suffix = PurePath(name).suffix
    path = folder / f"{hashlib.sha256(content).hexdigest()}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    if path.exists():
        return path
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"run_dir={folder.parent}: media of the data set cannot be written there ({error})") from error
    return path
