# SPDX-License-Identifier: Apache-2.0
"""Qwen's text models: Qwen3, dense or a mixture of experts (arXiv 2505.09388), and Qwen2 and Qwen2.5."""
