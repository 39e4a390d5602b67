# SPDX-License-Identifier: Apache-2.0
"""NaN out of the vision tower: the item is set aside by name, the others go on, and nothing of it reaches the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.video.prefetch import FramePrefetcher
from megatron_rl.media.embedding_store import DiskStore
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.runtime.device import choose_backend
from megatron_rl.types import MediaItem
from model_providers.provider import open_provider
from tests import tiny_policy as tp
from tests.vision_parts import MadeFrames, made_frame
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")


@pytest.fixture
def videos(tmp_path: Path) -> list[MediaItem]:
    """20 and 3 temporal patches of two files, whose frames MadeFrames tells apart by the last four letters."""
    made = [replace(tp.video(name, (t, 4, 4)), path=str(tmp_path / f"{name}000")) for name, t in (("a", 20), ("b", 3))]
    for video in made:
        Path(video.path).write_text(f"content of {video.key}")
    return made


def open_stored(checkpoint: Path, folder: Path) -> ParallelEncoder:
    dist.init_process_group("gloo")
    media_encoder = open_provider(checkpoint).build_encoder(choose_backend("cpu", "float32"), torch.device("cpu"))
    assert media_encoder is not None
    store = DiskStore(folder, 1 << 30, media_encoder.fingerprint(), media_encoder.dtype, media_encoder.width)
    return ParallelEncoder(media_encoder, FramePrefetcher(MadeFrames(), 0), frames_per_chunk=16, store=store)


def _encode_with_damage(rank: int, checkpoint: Path, folder: Path, videos: list[MediaItem], name: str) -> Any:
    """One projector weight is NaN; or (`name`) only what the tower makes of one file's frames."""
    cache = open_stored(checkpoint, folder)
    media_encoder: Any = cache._encoder
    if not name:
        next(p for n, p in media_encoder.module.named_parameters() if "merger" in n).data.view(-1)[0] = torch.nan
    original = media_encoder.encode

    def encode(frames: Tensor, kind: str) -> Tensor:
        embeds = original(frames, kind)
        shown = torch.stack([made_frame(name, i, frames.shape[-2:]) for i in range(40)]) if name else frames[:0]
        return embeds * torch.nan if any(torch.equal(frames[0], one) for one in shown) else embeds

    media_encoder.encode = encode
    failed = cache.encode(videos)
    kept = [v for v in videos if v.key not in failed]
    return failed, {key: bool(t.isfinite().all()) for key, t in cache.fetch(kept).tables.items()}


def test_embeddings_that_are_not_finite_are_refused_by_name_and_never_kept(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path
) -> None:
    for folder, name, bad in (("all", "", {"a", "b"}), ("one", videos[0].path, {"a"})):
        for failed, fetched in run_world(2, _encode_with_damage, tiny_checkpoint, tmp_path / folder, videos, name):
            assert failed.keys() == bad and fetched == dict.fromkeys({"a", "b"} - bad, True)
            assert all(reason.startswith("its embeddings are not finite (the file was") for reason in failed.values())
    assert not list((tmp_path / "all").rglob("*.safetensors"))
    assert len(list((tmp_path / "one").rglob("*.safetensors"))) == 1
