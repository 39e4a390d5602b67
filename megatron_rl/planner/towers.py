# SPDX-License-Identifier: Apache-2.0
"""Vision towers as arithmetic: tokens of a video, parameters, FLOPs and working memory of encoding it.

Qwen2.5-VL: transformers' `Qwen2_5_VisionTransformerPretrainedModel`, attention in windows but for a few layers, never
across a temporal patch. SigLIP: `SiglipVisionModel` with LongVILA's projector; every frame stands alone.
Shapes: F frames, patches are the tower's own (before they are merged into language tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_ASPECT = 200  # of a picture's sides, as in transformers' smart_resize


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) after resizing: multiples of `factor`, area within bounds, nearly the same aspect.

    The arithmetic of transformers' Qwen2-VL image processor, whose import would load torch.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"--video={width}x{height}: wider than {MAX_ASPECT} to 1, which the model refuses; change it")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer. `window` is the side of an attention window in pixels; 0: every layer sees all patches.

    attended_frames: frames that attend to each other (a temporal patch, or one frame)
    linears: weights that every patch is multiplied with; merged_linears: those that every merged group is
    fixed_size: side of the square to which every frame is resized; 0: by area (`smart_resize`)
    """

    num_params: int
    linears: int
    merged_linears: int
    depth: int
    hidden: int
    ffn: int
    patch: int
    temporal_patch: int
    merge: int
    window: int
    num_full_layers: int
    fixed_size: int
    tokens_after_frame: int
    is_gated: bool

    def size_hw(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        if self.fixed_size:
            return self.fixed_size, self.fixed_size
        return smart_resize(height, width, self.patch * self.merge, min_pixels, max_pixels)

    def patches(self, num_frames: int, size_hw: tuple[int, int]) -> int:
        return num_frames // self.temporal_patch * (size_hw[0] // self.patch) * (size_hw[1] // self.patch)

    def tokens(self, num_frames: int, size_hw: tuple[int, int]) -> int:
        """Language tokens of a video; `num_frames` is a multiple of the temporal patch."""
        groups = num_frames // self.temporal_patch
        return self.patches(num_frames, size_hw) // self.merge**2 + groups * self.tokens_after_frame

    def flops(self, num_frames: int, size_hw: tuple[int, int]) -> float:
        """Of one forward pass: 2 a weight and patch, 4 * hidden a pair of patches that attend to each other."""
        patches = self.patches(num_frames, size_hw)
        in_frame = (size_hw[0] // self.patch) * (size_hw[1] // self.patch)
        in_window = min(in_frame, (self.window // self.patch) ** 2) if self.window else in_frame
        attended = self.num_full_layers * in_frame + (self.depth - self.num_full_layers) * in_window
        linear = 2.0 * (self.linears * patches + self.merged_linears * patches / self.merge**2)
        return linear + 4.0 * self.hidden * patches * attended

    def working_bytes(self, num_frames: int, size_hw: tuple[int, int], dtype_bytes: int) -> float:
        """While `num_frames` are encoded without gradients: frames in fp32 twice (normalising, cutting into patches),
        then the residual stream, a norm's fp32 copy, q, k, v and the widest layer of the feed-forward network."""
        pixels = 3.0 * num_frames * size_hw[0] * size_hw[1]
        widest = max(4 * self.hidden, (3 if self.is_gated else 2) * self.ffn)
        per_patch = dtype_bytes * (2 * self.hidden + widest) + 4 * 2 * self.hidden
        return pixels * 4 * 2 + pixels * dtype_bytes + per_patch * self.patches(num_frames, size_hw)

    def kept_bytes(self, num_frames: int, size_hw: tuple[int, int], dtype_bytes: int) -> float:
        """What transformers' modules keep for a backward, in round numbers: in a layer two norms (input twice in fp32,
        normalised, output), q, k, v before and after rotary, out, and each step of the feed-forward network."""
        norms = 2 * self.hidden * (2 * 4 + 2 * dtype_bytes)
        steps = 5 if self.is_gated else 2
        layer = norms + dtype_bytes * (7 * self.hidden + steps * self.ffn)
        return self.depth * layer * self.patches(num_frames, size_hw)


def tower_of(config: Mapping[str, Any]) -> Tower | None:
    """The tower that a model's config.json describes; None for a text model."""
    vision = config.get("vision_config")
    if not vision:
        return None
    kind = vision.get("model_type", config["model_type"])  # the hub's files leave it to the model's own
    if kind not in _TOWERS:
        raise ValueError(f"model.hf: vision_config.model_type={kind}: not planned yet; one of {', '.join(_TOWERS)}")
    return _TOWERS[kind](vision)


def _qwen(vision: Mapping[str, Any]) -> Tower:
    hidden, ffn, depth = vision["hidden_size"], vision["intermediate_size"], vision["depth"]
    patch, temporal, merge = vision["patch_size"], vision["temporal_patch_size"], vision["spatial_merge_size"]
    out, merged = vision["out_hidden_size"], hidden * merge**2
    embed = vision.get("in_channels", 3) * temporal * patch**2 * hidden
    block = 4 * hidden**2 + 3 * hidden * ffn
    block_rest = 2 * hidden + 4 * hidden + 2 * ffn + hidden  # two norms; biases of qkv and proj, gate and up, down
    merger = merged**2 + merged * out
    return Tower(
        num_params=embed + depth * (block + block_rest) + hidden + merger + merged + out,
        linears=embed + depth * block,
        merged_linears=merger,
        depth=depth,
        hidden=hidden,
        ffn=ffn,
        patch=patch,
        temporal_patch=temporal,
        merge=merge,
        window=vision["window_size"],
        num_full_layers=len(vision["fullatt_block_indexes"]),
        fixed_size=0,
        tokens_after_frame=0,
        is_gated=True,
    )


def _siglip(vision: Mapping[str, Any]) -> Tower:
    """Without SigLIP's pooling head, which a video has no use for; the projector is norm, linear, GELU, linear."""
    hidden, ffn, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patch, size, merge, out = (vision[k] for k in ("patch_size", "image_size", "spatial_merge_size", "out_hidden_size"))
    merged, positions = hidden * merge**2, (size // patch) ** 2
    embed = 3 * patch**2 * hidden
    block = 4 * hidden**2 + 2 * hidden * ffn
    block_rest = 4 * hidden + 4 * hidden + ffn + hidden  # two norms with bias; biases of q, k, v, out, fc1, fc2
    projector = merged * out + out**2
    return Tower(
        num_params=embed
        + hidden
        + positions * hidden
        + depth * (block + block_rest)
        + 2 * hidden
        + projector
        + 2 * merged
        + 2 * out,
        linears=embed + depth * block,
        merged_linears=projector,
        depth=depth,
        hidden=hidden,
        ffn=ffn,
        patch=patch,
        temporal_patch=1,
        merge=merge,
        window=0,
        num_full_layers=depth,
        fixed_size=size,
        tokens_after_frame=vision["tokens_after_frame"],
        is_gated=False,
    )


_TOWERS = {"qwen2_5_vl": _qwen, "qwen2_5_vl_vision": _qwen, "siglip_vision_model": _siglip}
