# SPDX-License-Identifier: Apache-2.0
"""Libraries' notices to each other (deprecations, what is not installed), which tell a user nothing."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Keep them out of sight; `python -W default` or PYTHONWARNINGS brings them back. Call before importing any."""
    if not sys.warnoptions:
        for module in (
            r"megatron\.core\.",
            r"megatron_rl\.runtime\.mcore_on_cpu",
            r"torch\.",
            r"vllm\.",
            r"transformers\.",
        ):
            warnings.filterwarnings("ignore", module=module)
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
