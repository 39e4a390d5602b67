# SPDX-License-Identifier: Apache-2.0
"""Videos encoded in chunks on many ranks: exact, balanced, and a faulty file fails for all alike."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.video.pixels import CpuVideoDecoder
from data.video.prefetch import FramePrefetcher
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.media.routes import EncodeChunk, split_over_ranks
from megatron_rl.runtime.device import choose_backend
from megatron_rl.types import MediaItem
from model_providers.provider import open_provider
from tests.world import run_world


def artifact(key: str, grid_t: int, tokens_per_patch: int = 4, path: str = "", size: int = 56) -> MediaItem:
    """A video of 2 * grid_t frames; of a 12-frame file, frames 0, 1, 2 ... round and round."""
    frames = tuple(i % 12 for i in range(2 * grid_t))
    side = size // 14
    grid = (grid_t, side, side) if path else (grid_t, 2, 2 * tokens_per_patch)
    num_tokens = grid[0] * grid[1] * grid[2] // 4
    times, per_unit = (0.0,) * len(frames), grid[1] * grid[2] // 4
    return MediaItem(key, path, frames, times, (size, size), grid, 1.0, num_tokens, len(frames), 2, per_unit)


BATCHES = {
    "none": [],
    "one short": [artifact("a", 1)],
    "fewer patches than ranks": [artifact("a", 2), artifact("b", 1)],
    "equal": [artifact(str(i), 4) for i in range(6)],
    "one long": [artifact("a", 97)],
    "different lengths": [artifact("a", 1), artifact("b", 30), artifact("c", 2), artifact("d", 13)],
    "different sizes": [artifact("a", 9, 1), artifact("b", 5, 30), artifact("c", 11, 7)],
}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_chunks_cover_every_patch_once_in_order(batch: str, world: int) -> None:
    videos = BATCHES[batch]
    chunks = split_over_ranks(videos, world)
    assert list(chunks) == [v.key for v in videos]
    for video in videos:
        mine = chunks[video.key]
        assert mine[0].start == 0 and mine[-1].stop == video.grid_thw[0]
        assert all(a.stop == b.start and a.owner < b.owner for a, b in pairwise(mine))
        assert all(p.start < p.stop and 0 <= p.owner < world and p.key == video.key for p in mine)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_no_rank_has_more_than_its_share_and_one_patch(batch: str, world: int) -> None:
    videos = BATCHES[batch]
    per_patch = {v.key: v.num_tokens // v.grid_thw[0] for v in videos}
    load = [0] * world
    for chunk in (p for chunks in split_over_ranks(videos, world).values() for p in chunks):
        load[chunk.owner] += (chunk.stop - chunk.start) * per_patch[chunk.key]
    share = sum(v.num_tokens for v in videos) / world
    assert max(load) <= share + max(per_patch.values(), default=0)


def open_encoder(folder: Path) -> ParallelEncoder:
    dist.init_process_group("gloo")
    backend, provider = choose_backend("cpu", "float32"), open_provider(folder, 3136, 3136)
    media_encoder = provider.build_encoder(backend, torch.device("cpu"))
    return ParallelEncoder(media_encoder, FramePrefetcher(CpuVideoDecoder(1), 1 << 30))


def _encode_and_fetch(rank: int, folder: Path, videos: list[MediaItem]) -> list[dict[str, Tensor]]:
    """What each of three fetches gives: all; one other video per rank; none except on rank 0."""
    encoder = open_encoder(folder)
    assert encoder.encode(videos) == {}
    everything = encoder.fetch(videos).tables
    one = encoder.fetch([videos[rank % len(videos)]]).tables
    few = encoder.fetch(videos[::-1] if rank == 0 else []).tables
    return [everything, one, few]


@pytest.fixture(scope="module")
def videos(tiny_videos: Path) -> list[MediaItem]:
    """Two H.264 and one VP9 file; 9, 1 and 4 temporal patches, two sizes."""
    files = sorted((tiny_videos / "videos").glob("train_*.mp4"))
    sizes = ((9, 56), (1, 84), (4, 56))
    return [artifact(f"k{i}", t, path=str(files[i * 2]), size=size) for i, (t, size) in enumerate(sizes)]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, videos: list[MediaItem], heavy_imports: None) -> dict[str, Tensor]:
    """Every video encoded whole, in one chunk, by one rank."""
    [[everything, _, _]] = run_world(1, _encode_and_fetch, tiny_checkpoint, videos, timeout=120)
    return everything


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_encode_what_one_rank_does(
    world: int, tiny_checkpoint: Path, videos: list[MediaItem], alone: dict[str, Tensor]
) -> None:
    assert len(split_over_ranks(videos, world)["k0"]) > 1, "no video is split, so nothing is tested"
    ranks = run_world(world, _encode_and_fetch, tiny_checkpoint, videos, timeout=120)
    for rank, (everything, one, few) in enumerate(ranks):
        assert everything.keys() == alone.keys()
        for key, whole in alone.items():
            torch.testing.assert_close(everything[key], whole, rtol=1e-5, atol=1e-5)
        own = videos[rank % len(videos)].key
        assert list(one) == [own] and torch.equal(one[own], everything[own])
        assert list(few) == ([v.key for v in videos[::-1]] if rank == 0 else [])
    for rank in range(world):
        assert all(torch.equal(ranks[rank][0][key], ranks[0][0][key]) for key in alone), "ranks see other embeddings"


class CountingDecoder(CpuVideoDecoder):
    """Notes what is decoded, and in which thread."""

    def __init__(self) -> None:
        super().__init__(1)
        self.calls: list[tuple[str, tuple[int, ...], bool]] = []

    def decode(self, path: str, frame_indices, size_hw):
        in_background = threading.current_thread() is not threading.main_thread()
        self.calls.append((path, tuple(frame_indices), in_background))
        return super().decode(path, frame_indices, size_hw)


def _encode_prefetched(rank: int, folder: Path, now: list[MediaItem], upcoming: list[MediaItem]):
    dist.init_process_group("gloo")
    provider, decoder = open_provider(folder, 3136, 3136), CountingDecoder()
    media_encoder = provider.build_encoder(choose_backend("cpu", "float32"), torch.device("cpu"))
    encoder = ParallelEncoder(media_encoder, FramePrefetcher(decoder, 1 << 30))
    encoder.encode(now)
    encoder.prefetch(upcoming)
    encoder.encode([replace(now[0], key="evaluation between")])
    encoder.forget()
    encoder.encode(upcoming)
    return encoder.fetch(upcoming).tables, decoder.calls


@pytest.mark.parametrize("world", [1, 3])
def test_frames_made_ready_are_the_same_and_no_frame_of_a_batch_is_decoded_twice_on_the_node(
    world: int, tiny_checkpoint: Path, videos: list[MediaItem], alone: dict[str, Tensor], monkeypatch
) -> None:
    monkeypatch.setattr("megatron_rl.media.reading.DECODED_BYTES", 3 * 2 * 3 * 56 * 56)  # 3 temporal patches
    ranks = run_world(world, _encode_prefetched, tiny_checkpoint, videos[:1], videos[1:], timeout=120)
    for embeds, _ in ranks:
        for video in videos[1:]:
            torch.testing.assert_close(embeds[video.key], alone[video.key], rtol=1e-5, atol=1e-5)
    for video in videos[1:]:
        calls = [(frames, background) for _, calls in ranks for path, frames, background in calls if path == video.path]
        assert all(background for _, background in calls)
        assert sum(len(frames) for frames, _ in calls) == len(video.frame_indices)


def _transformers_embeddings(folder: Path, video: MediaItem) -> tuple[Tensor, Tensor]:
    """transformers' own processor and encoder: (on frames that we resized, on full-size frames it resizes itself)."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Qwen2VLVideoProcessor.from_pretrained(folder)
    decoder = CpuVideoDecoder(1)
    results = []
    for size_hw in (video.size_hw, (64, 64)):
        frames = decoder.decode(video.path, video.frame_indices, size_hw)
        inputs = processor(
            videos=[frames],
            do_sample_frames=False,
            size={"shortest_edge": 3136, "longest_edge": 3136},
            return_tensors="pt",
        )
        assert inputs["video_grid_thw"].tolist() == [list(video.grid_thw)]
        with torch.inference_mode():
            output = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
        results.append(output.pooler_output.clone())
    return results[0], results[1]


def test_embeddings_are_those_of_transformers(
    tiny_checkpoint: Path, videos: list[MediaItem], alone: dict[str, Tensor]
) -> None:
    def compare(rank: int) -> tuple[Tensor, Tensor]:
        return _transformers_embeddings(tiny_checkpoint, videos[0])

    [(same_frames, own_resize)] = run_world(1, compare, timeout=120)
    ours = alone["k0"]
    torch.testing.assert_close(ours, same_frames, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, own_resize, rtol=0, atol=1e-4)


def _encode_with_a_bad_file(rank: int, folder: Path, good: list[MediaItem], bad: list[MediaItem]):
    encoder = open_encoder(folder)
    first = encoder.encode([good[0], *bad, good[1]])
    again = encoder.encode([*bad, good[2]])  # the same rows may come again within a step
    fetched = encoder.fetch(good).tables
    encoder.forget()
    third = encoder.encode([good[0]])
    shapes = {key: tuple(t.shape) for key, t in fetched.items()}
    return first, again, shapes, third, list(encoder.fetch([good[0]]).tables)


def test_a_faulty_file_fails_on_all_ranks_and_the_others_go_on(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path, heavy_imports: None
) -> None:
    broken = tmp_path / "broken.mp4"
    content = Path(videos[0].path).read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    bad = [
        replace(videos[0], key="broken", path=str(broken)),
        replace(videos[0], key="absent", path=str(tmp_path / "absent.mp4")),
        replace(videos[0], key="short", frame_indices=(0, 1) * 8 + (0, 99)),
    ]
    ranks = run_world(2, _encode_with_a_bad_file, tiny_checkpoint, videos, bad, timeout=120)
    for first, again, shapes, third, last in ranks:
        assert first == again == ranks[0][0]
        assert set(first) == {"broken", "absent", "short"} and all(first.values())
        assert shapes == {v.key: (v.num_tokens, 128) for v in videos}
        assert third == {} and last == ["k0"]


def _encode_blank(rank: int, folder: Path, video: MediaItem) -> tuple[Tensor, Tensor, Tensor]:
    seeing = open_encoder(folder)
    blind = seeing.blanked()
    other = replace(video, path=video.path.replace("train_0000", "train_0001"))
    assert seeing.encode([video]) == blind.encode([video]) == {}
    key = video.key
    shown, black = seeing.fetch([video]).tables[key], blind.fetch([video]).tables[key]
    blind.forget()
    blind.encode([other])
    return shown, black, blind.fetch([other]).tables[key]


def test_blanked_frames_tell_nothing_about_the_video(
    tiny_checkpoint: Path, videos: list[MediaItem], alone: dict[str, Tensor]
) -> None:
    [(shown, black, other_black)] = run_world(1, _encode_blank, tiny_checkpoint, videos[0], timeout=120)
    assert torch.equal(shown, alone["k0"])
    assert black.shape == shown.shape and not torch.allclose(black, shown, atol=0.1)
    assert torch.equal(black, other_black)


def test_chunks_are_plain_values() -> None:
    assert split_over_ranks([artifact("a", 3)], 1) == {"a": [EncodeChunk("a", 0, 3, 0)]}
