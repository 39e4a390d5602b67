# SPDX-License-Identifier: Apache-2.0
"""Frames -> patches -> embeddings, with transformers' own vision encoder of Qwen2.5-VL.

It stands outside the pipeline: every rank holds it and encodes some of the frames. Its attention never crosses a
temporal patch, so a video can be encoded in chunks of temporal patches, exactly. Shapes: types.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_rl.protocols import MediaSpecs
from megatron_rl.runtime.device import Backend, define_torchvision_operators
from megatron_rl.types import MediaItem, MediaKind, Placeholder, VisionPart
from model_providers.family import PixelBounds
from model_providers.hf_checkpoint import HfCheckpoint

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

HF_PREFIX = "visual."

# Fallbacks of transformers' Qwen2VLVideoProcessor, for checkpoints without preprocessor files.
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class QwenMediaSpec:
    """The arithmetic between a video file and its tokens (protocol MediaSpec)."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    total_pixels: int
    placeholder_ids: Mapping[MediaKind, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frame_family: Literal["stride"] = "stride"

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """As transformers' Qwen2VLVideoProcessor; a bound on the whole video is shared evenly by its frames (there
        `cap_pixels_per_frame`)."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        factor, largest = self.patch_size * self.merge_size, self.max_pixels
        if self.total_pixels:
            share = self.total_pixels * self.temporal_patch_size // num_frames
            largest = max(min(largest, share), int(self.min_pixels * 1.05))
        return smart_resize(height, width, factor, self.min_pixels, largest)

    def tokens_per_unit(self, size_hw: tuple[int, int]) -> int:
        """Of a temporal patch: its patches, merged."""
        return size_hw[0] * size_hw[1] // (self.patch_size * self.merge_size) ** 2

    def placeholder(self, item: MediaItem, sound: MediaItem | None = None) -> Placeholder:
        """One run of the item's own token."""
        assert sound is None, "this family does not hear"
        ids = (self.placeholder_ids[item.kind],) * item.num_tokens
        return Placeholder(ids, (((0, item.num_tokens),),))

    def patchify(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """uint8 [F, 3, height, width] -> normalised patches [t * h * w, 3 * temporal patch * patch ** 2] and the grid
        (t, h, w)."""
        p, m, tp = self.patch_size, self.merge_size, self.temporal_patch_size
        mean = torch.tensor(self.mean, device=frames.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=frames.device).view(1, 3, 1, 1) * 255
        x = (frames.float() - mean) / std
        t, h, w = x.shape[0] // tp, x.shape[2] // p, x.shape[3] // p
        x = x.view(t, tp, 3, h // m, m, p, w // m, m, p)
        x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, h/m, w/m, m, m, C, tp, p, p
        return x.reshape(t * h * w, 3 * tp * p * p), (t, h, w)


class QwenVisionEncoder:
    """The vision tower with its projector (the merger): uint8 frames -> embeddings (protocol MediaEncoder)."""

    def __init__(
        self,
        module: torch.nn.Module,
        config: Qwen2_5_VLVisionConfig,
        spec: QwenMediaSpec,
        backend: Backend,
        device: torch.device,
        trained: frozenset[VisionPart] = frozenset(),
    ):
        self.module = module.to(device=device, dtype=backend.dtype).eval()
        for name, param in self.module.named_parameters():
            param.requires_grad_(("projector" if name.startswith("merger.") else "tower") in trained)
        self.spec, self._config = spec, config
        self.device = device
        self.dtype = backend.dtype
        self.trained = trained
        self.version = 0
        self.is_original = not trained

    @property
    def width(self) -> int:
        return self._config.out_hidden_size

    @property
    def is_trained(self) -> bool:
        return bool(self.trained)

    def named_weights(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, trained or not, by Hugging Face name."""
        return {f"{HF_PREFIX}{name}": param for name, param in self.module.named_parameters()}

    def fingerprint(self) -> str:
        """sha256 of all that decides what `encode` makes of given frames: weights, dtype, kind of device, patches."""
        spec = self.spec
        settings = (spec.patch_size, spec.temporal_patch_size, spec.merge_size, spec.mean, spec.std)
        digest = hashlib.sha256(repr((settings, self.dtype, self.device.type, self._config.to_dict())).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, frames: Tensor, kind: MediaKind = "video") -> Tensor:
        """uint8 [F, 3, height, width], F a multiple of the temporal patch -> [n, H]; images alike."""
        return self._forward(frames).clone()

    def backward(self, frames: Tensor, grad: Tensor, kind: MediaKind = "video") -> None:
        """Encode once more and add to the gradients of the parameters what `grad` [n, H] of the result gives."""
        self._forward(frames).backward(grad.to(self.dtype))

    def _forward(self, frames: Tensor) -> Tensor:
        patches, grid = self.spec.patchify(frames.to(self.device))
        output = self.module(patches.to(self.dtype), grid_thw=torch.tensor([grid], device=self.device))
        return output.pooler_output


def specs_of(config: Mapping[str, Any], folder: Path, bounds: PixelBounds) -> MediaSpecs:
    """From config.json and the files of the processor."""
    vision = config["vision_config"]
    processor: dict[str, Any] = {}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            settings = json.loads((folder / file).read_text())
            processor |= settings.get("video_processor", settings)
    return MediaSpecs(
        QwenMediaSpec(
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            merge_size=vision["spatial_merge_size"],
            min_pixels=bounds.least,
            max_pixels=bounds.most,
            total_pixels=bounds.total,
            placeholder_ids={"video": config["video_token_id"], "image": config["image_token_id"]},
            mean=tuple(processor.get("image_mean", OPENAI_CLIP_MEAN)),
            std=tuple(processor.get("image_std", OPENAI_CLIP_STD)),
        )
    )


def build_encoder(
    model_config: Mapping[str, Any],
    checkpoint: HfCheckpoint,
    specs: MediaSpecs,
    backend: Backend,
    device: torch.device,
    trained: frozenset[VisionPart] = frozenset(),
) -> QwenVisionEncoder:
    """The encoder with the checkpoint's weights; every missing or misshapen tensor is named in one WeightMismatch."""
    define_torchvision_operators()
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(**model_config["vision_config"])
    config._attn_implementation = "sdpa"
    module = Qwen2_5_VisionTransformerPretrainedModel(config)
    state = module.state_dict()
    checkpoint.check({f"{HF_PREFIX}{name}": tuple(tensor.shape) for name, tensor in state.items()})
    loaded = {name: checkpoint.tensor(f"{HF_PREFIX}{name}") for name in state}
    checkpoint.check_finite({f"{HF_PREFIX}{name}": tensor for name, tensor in loaded.items()})
    module.load_state_dict(loaded)
    spec = specs.pictures
    assert isinstance(spec, QwenMediaSpec), "what `specs_of` makes"
    return QwenVisionEncoder(module, config, spec, backend, device, trained)
