# SPDX-License-Identifier: Apache-2.0
"""Notices of libraries stay out of sight; those of our own modules must be named as they are called today."""

from __future__ import annotations

import importlib.util
import warnings

from megatron_rl.runtime.quiet import quiet_libraries


def test_what_is_kept_quiet_exists() -> None:
    with warnings.catch_warnings():
        quiet_libraries()
        named = [entry[3].pattern for entry in warnings.filters if entry[3] is not None and entry[0] == "ignore"]
    ours = [name.replace("\\", "") for name in named if name.startswith("megatron_rl")]
    assert ours == ["megatron_rl.runtime.mcore_on_cpu"]
    assert all(importlib.util.find_spec(name) is not None for name in ours)
