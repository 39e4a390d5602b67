# SPDX-License-Identifier: Apache-2.0
"""How much is computed at a time. Trainer, engine and planner read the same numbers; no torch."""

LOGIT_CHUNK = 1024  # response tokens whose logits exist at a time
FEED_FORWARD_ROWS = 8192
"""Rows of a context parallel rank whose intermediate activations exist at a time. So many keep a GPU busy;
adding up weight gradients costs a few percent."""
GPU_PREFILL_TOKENS = 8192  # prompt tokens in one step of an engine on a GPU
