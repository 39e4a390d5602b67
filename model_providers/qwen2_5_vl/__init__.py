# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: text, images and video with absolute time in its rotary positions (arXiv 2502.13923)."""
