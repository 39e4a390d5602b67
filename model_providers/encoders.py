# SPDX-License-Identifier: Apache-2.0
"""Several encoders of one model as one MediaEncoder: a vision encoder and an audio encoder, by kind of media."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.protocols import MediaEncoder
from megatron_rl.types import MediaKind


class EncodersByKind:
    """Encoders of the same width, dtype and device (protocol MediaEncoder)."""

    def __init__(self, encoders: Mapping[MediaKind, MediaEncoder]):
        self._by_kind = dict(encoders)
        self._distinct = list({id(encoder): encoder for encoder in encoders.values()}.values())
        first = self._distinct[0]
        for other in self._distinct:
            assert (other.width, other.dtype, other.device) == (first.width, first.dtype, first.device)
        self.dtype, self.device, self.trained = first.dtype, first.device, first.trained
        self.module: torch.nn.Module = torch.nn.ModuleList([encoder.module for encoder in self._distinct])
        self.version = 0
        self.is_original = all(encoder.is_original for encoder in self._distinct)

    @property
    def width(self) -> int:
        return self._distinct[0].width

    @property
    def is_trained(self) -> bool:
        return bool(self.trained)

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, trained or not, by Hugging Face name."""
        return {name: param for encoder in self._distinct for name, param in encoder.named_weights().items()}

    def fingerprint(self) -> str:
        """sha256 over those of the encoders."""
        return hashlib.sha256(repr([encoder.fingerprint() for encoder in self._distinct]).encode()).hexdigest()

    def encode(self, frames: Tensor, kind: MediaKind = "video") -> Tensor:
        """As the encoder of the kind: [F, ...] -> [n, width]."""
        return self._by_kind[kind].encode(frames, kind)

    def backward(self, frames: Tensor, grad: Tensor, kind: MediaKind = "video") -> None:
        """As the encoder of the kind: `frames` [F, ...], `grad` [n, width]."""
        self._by_kind[kind].backward(frames, grad, kind)
