# SPDX-License-Identifier: Apache-2.0
"""Qwen's dense text models: Qwen3 (arXiv 2505.09388) and, with a QKV bias and no q/k norms, Qwen2 and Qwen2.5."""
