# SPDX-License-Identifier: Apache-2.0
"""Embeddings on disk: used again by any world, never when stale, foreign or damaged; bounded; shared by runs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.video.prefetch import FramePrefetcher
from megatron_rl.cache_videos import fill_cache as fill
from megatron_rl.config.schema import CheckpointConfig, SftConfig
from megatron_rl.media import embedding_store
from megatron_rl.media.embedding_store import DiskStore
from megatron_rl.media.encoder import EncoderCounts, ParallelEncoder
from megatron_rl.runtime.device import choose_backend
from megatron_rl.types import MediaItem
from model_providers.provider import open_provider
from tests import tiny_policy as tp
from tests.rollout_parts import as_sft, small_config
from tests.vision_parts import MadeFrames
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

ROOMY = 1 << 30
NUM_PATCHES = (20 + 3) * 16  # of the two videos below
NUM_ENTRIES = 3 + 1


@pytest.fixture
def videos(tmp_path: Path) -> list[MediaItem]:
    """20 and 3 temporal patches of two files whose content is a few words."""
    made = [replace(tp.video(name, (t, 4, 4)), path=str(tmp_path / f"{name}.mp4")) for name, t in (("a", 20), ("b", 3))]
    for video in made:
        Path(video.path).write_text(f"content of {video.key}")
    return made


def _open(checkpoint: Path, folder: Path, max_bytes: int = ROOMY, dtype: str = "float32") -> ParallelEncoder:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    backend, provider = choose_backend("cpu", dtype), open_provider(checkpoint)
    media_encoder = provider.build_encoder(backend, torch.device("cpu"))
    store = DiskStore(folder, max_bytes, media_encoder.fingerprint(), media_encoder.dtype, media_encoder.width)
    frames = FramePrefetcher(MadeFrames(), 0)
    return ParallelEncoder(media_encoder, frames, frames_per_chunk=16, store=store)


def _run(
    world: int, checkpoint: Path, folder: Path, videos: Sequence[MediaItem], **options: Any
) -> tuple[EncoderCounts, dict[str, Tensor]]:
    """Counts of all ranks together, and the embeddings (which are the same on every rank)."""

    def work(rank: int) -> tuple[EncoderCounts, dict[str, Tensor]]:
        encoder = _open(checkpoint, folder, **options)
        assert encoder.encode(videos) == {}
        made = encoder.fetch(videos).tables
        return encoder.take_counts(), made

    ranks = run_world(world, work)
    total = EncoderCounts()
    for counts, made in ranks:
        for name in EncoderCounts.__slots__:
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        _assert_equal(made, ranks[0][1])
    return total, ranks[0][1]


def _assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], t) for key, t in expected.items())


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _entries(folder))


def test_another_world_uses_what_is_there(tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cold, made = _run(2, tiny_checkpoint, folder, videos)
    assert (cold.encoded_patches, cold.cached_patches) == (NUM_PATCHES, 0)
    assert len(_entries(folder)) == NUM_ENTRIES and not list(folder.rglob("*.partial"))
    for world in (1, 3):
        warm, again = _run(world, tiny_checkpoint, folder, videos)
        assert (warm.encoded_patches, warm.cached_patches, warm.damaged_entries) == (0, NUM_PATCHES, 0)
        _assert_equal(again, made)


def _rewrite(path: Path, content: str) -> None:
    """Other content of the same size, under the old time of modification."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_text(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("settled", [0, 2_000_000_000])
def test_a_file_that_has_changed_is_encoded_anew(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: int
) -> None:
    monkeypatch.setattr(embedding_store, "SETTLED_NS", settled)
    folder = tmp_path / "cache"
    _run(1, tiny_checkpoint, folder, videos)
    assert len(list((folder / "files").iterdir())) == (2 if settled == 0 else 0), "a young file is not remembered"
    _rewrite(Path(videos[0].path), "CONTENT of a")
    counts, _ = _run(1, tiny_checkpoint, folder, videos)
    assert (counts.encoded_patches, counts.cached_patches) == (20 * 16, 3 * 16)
    moved = replace(videos[1], key="moved", path=str(tmp_path / "moved.mp4"))
    Path(videos[1].path).rename(moved.path)
    counts, _ = _run(1, tiny_checkpoint, folder, [moved])
    assert counts.cached_patches == 3 * 16, "the content counts, not the name"


def test_a_file_that_changes_during_a_run(tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path) -> None:
    """Nothing of what it was is used, and nothing is kept under its old content."""

    def work(rank: int) -> tuple[int, int]:
        encoder = _open(tiny_checkpoint, tmp_path / "cache")
        encoder.encode(videos[:1])
        encoder.forget()
        _rewrite(Path(videos[0].path), "CONTENT of a")
        encoder.encode(videos[:1])
        store = encoder._store
        _rewrite(Path(videos[0].path), "Content of a")
        before = len(_entries(tmp_path / "cache"))
        store.write(videos[0], 0, 8, torch.zeros(8 * 4, tp.HIDDEN))
        assert len(_entries(tmp_path / "cache")) == before
        return encoder.take_counts().encoded_patches, before

    assert run_world(1, work) == [(2 * 20 * 16, 6)]


def test_other_frames_sizes_weights_or_dtypes_are_others(
    tiny_checkpoint: Path, tied_checkpoint: Path, videos: list[MediaItem], tmp_path: Path
) -> None:
    folder, b = tmp_path / "cache", videos[1]
    _, made = _run(1, tiny_checkpoint, folder, [b])
    others = [
        replace(b, key="frames", frame_indices=(0, 1, 2, 3, 5, 5)),
        replace(b, key="size", size_hw=(28, 112), grid_thw=(3, 2, 8)),
    ]
    counts, _ = _run(1, tiny_checkpoint, folder, others)
    assert counts.cached_patches == 0
    counts, other_weights = _run(1, tied_checkpoint, folder, [b])
    assert counts.cached_patches == 0 and not torch.allclose(other_weights["b"], made["b"], atol=0.1)
    counts, half = _run(1, tiny_checkpoint, folder, [b], dtype="bfloat16")
    assert counts.cached_patches == 0 and half["b"].dtype == torch.bfloat16
    counts, _ = _run(1, tiny_checkpoint, folder, [b, *others])
    assert counts.encoded_patches == 0 and len(_entries(folder)) == 5


def _flip_a_bit(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "a bit": _flip_a_bit,
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "cut in the header": lambda path, other: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path, other: path.write_bytes(b""),
    "something else": lambda path, other: path.write_text("not an entry " * 100),
    "another entry": lambda path, other: path.write_bytes(other.read_bytes()),
}


def test_a_damaged_or_foreign_entry_is_never_used(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        encoder, folder = _open(tiny_checkpoint, tmp_path / "cache"), tmp_path / "cache"

        def encode() -> tuple[EncoderCounts, dict[str, Tensor]]:
            encoder.forget()
            encoder.encode(videos[:1])
            return encoder.take_counts(), encoder.fetch(videos[:1]).tables

        _, made = encode()
        first, second, _ = _entries(folder)
        for how, damage in DAMAGE.items():
            damage(first, second)
            counts, again = encode()
            assert counts.damaged_entries == 1 and counts.encoded_patches in (8 * 16, 4 * 16), how
            _assert_equal(again, made)
            counts, _ = encode()
            assert (counts.damaged_entries, counts.encoded_patches) == (0, 0), f"{how}: it was not written anew"

    run_world(1, work)


def _filled(checkpoint: Path, folder: Path, video: MediaItem) -> tuple[DiskStore, Tensor]:
    """A store that knows `video`, and the embeddings of its only entry."""
    encoder = _open(checkpoint, folder)
    encoder.encode([video])
    store = encoder._store
    assert isinstance(store, DiskStore)
    return store, encoder.fetch([video]).tables[video.key]


def test_every_bit_of_the_header_counts(tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path) -> None:
    def work(rank: int) -> None:
        store, made = _filled(tiny_checkpoint, tmp_path / "cache", videos[1])
        [entry] = _entries(tmp_path / "cache")
        whole = entry.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for bit in range(8 * header):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            entry.write_bytes(data)
            embeds, num_damaged = store.read(videos[1], 0, 3)
            assert (embeds is None) == (num_damaged == 1), bit
            assert embeds is None or torch.equal(embeds, made), bit

    run_world(1, work)


def _remove_and_restore(entry: Path, kept: Path) -> None:
    """As another run would, thousands of times a second, until killed."""
    while True:
        entry.unlink()
        os.link(kept, entry)


def test_an_entry_that_another_run_removes_while_it_is_read(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        store, made = _filled(tiny_checkpoint, tmp_path / "cache", videos[1])
        [entry] = _entries(tmp_path / "cache")
        os.link(entry, tmp_path / "kept")
        other = multiprocessing.get_context("fork").Process(target=_remove_and_restore, args=(entry, tmp_path / "kept"))
        other.start()
        try:
            found: list[tuple[Tensor | None, int]] = []
            while len(found) < 3000 or {embeds is None for embeds, _ in found} != {True, False}:
                found.append(store.read(videos[1], 0, 3))
        finally:
            other.kill()
            other.join()
        assert not any(num_damaged for _, num_damaged in found)
        assert all(torch.equal(embeds, made) for embeds, _ in found if embeds is not None)

    run_world(1, work)


def test_what_was_used_longest_ago_goes_first(tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path) -> None:
    folder, hours_ago = tmp_path / "cache", time.time() - 7200
    _run(1, tiny_checkpoint, folder, [videos[1]])
    [kept] = _entries(folder)
    _run(1, tiny_checkpoint, folder, videos[:1])
    size = _size(folder)
    abandoned = kept.with_name(".x.partial")
    abandoned.write_text("")
    for path in [*_entries(folder), abandoned]:
        os.utime(path, (hours_ago, hours_ago))
    _run(1, tiny_checkpoint, folder, [videos[1]])  # used again: now the youngest
    third = replace(videos[0], key="third", frame_indices=tuple(range(1, 41)))
    _run(2, tiny_checkpoint, folder, [third], max_bytes=size)
    assert _size(folder) <= size
    assert kept in _entries(folder) and not abandoned.exists()
    counts, _ = _run(1, tiny_checkpoint, folder, [third])
    assert counts.encoded_patches == 0, "what was just made was thrown away"


def _alone(rank: int, checkpoint: Path, folder: Path, videos: Sequence[MediaItem], max_bytes: int) -> Any:
    """A run of one rank, of so many steps that it gets in the way of the others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    encoder = _open(checkpoint, folder, max_bytes)
    results = []
    for _ in range(12):
        assert encoder.encode(videos) == {}
        results.append(encoder.fetch(videos).tables)
        encoder.forget()
    for result in results[1:]:
        _assert_equal(result, results[0])
    return results[0], encoder.take_counts()


def test_runs_at_the_same_time_share_a_folder_that_is_too_small(
    tiny_checkpoint: Path, videos: list[MediaItem], tmp_path: Path
) -> None:
    once, made = _run(1, tiny_checkpoint, tmp_path / "other", videos)
    bound = _size(tmp_path / "other") * 2 // 3
    runs = run_world(3, _alone, tiny_checkpoint, tmp_path / "cache", videos, bound)
    for result, counts in runs:
        _assert_equal(result, made)
        assert counts.damaged_entries == 0
    # Which run makes an entry depends on who comes first; but somebody has to make every one of them.
    assert sum(counts.encoded_patches for _, counts in runs) >= once.encoded_patches > 0
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*cannot be written"):
        DiskStore(tmp_path / "file" / "cache", 1, "tower", torch.float32, 8)


# ---------------------------------------------------------------------------------------------------------------- jobs


def _recipe(checkpoint: Path, data: Path, run_dir: Path, cache: Path) -> SftConfig:
    cfg = as_sft(small_config(checkpoint, run_dir))
    return replace(
        cfg,
        data=replace(cfg.data, train=str(data / "train.jsonl"), eval=str(data / "eval.jsonl"), cache_dir=str(cache)),
        train=replace(cfg.train, prompts_per_step=3, num_steps=3),
        checkpoint=CheckpointConfig(save_at_end=False),
    )


def _sft(rank: int, cfg: SftConfig) -> None:
    from megatron_rl.sft import run

    run(cfg)


def _sft_counting_passes(rank: int, cfg: SftConfig) -> list[str]:
    """The video files that this rank read through in a job."""
    from data.video import index_store

    passes: list[str] = []
    read = index_store.read_index
    with mock.patch.object(index_store, "read_index", lambda path: passes.append(path) or read(path)):
        _sft(rank, cfg)
    return passes


def test_a_file_is_read_through_once_by_all_ranks_and_epochs(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path
) -> None:
    cfg = _recipe(tiny_checkpoint, tiny_videos, tmp_path / "run", tmp_path / "cache")
    two_epochs = replace(cfg, train=replace(cfg.train, num_steps=6), data=replace(cfg.data, cache_dir=""))
    passes = [path for part in run_world(2, _sft_counting_passes, two_epochs) for path in part]
    num_train = 8
    assert len(passes) == len(set(passes)) == num_train
    assert run_world(2, _sft_counting_passes, replace(two_epochs, seed=2)) == [[], []], "a run that goes on"


def _metric(cfg: SftConfig, name: str) -> list[float]:
    from megatron_rl.observe.metric_log import METRICS_FILE, read_metrics

    return [row[name] for row in read_metrics(Path(cfg.run_dir) / METRICS_FILE)]


def test_a_second_run_of_a_recipe_encodes_nothing(tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path) -> None:
    first = _recipe(tiny_checkpoint, tiny_videos, tmp_path / "first", tmp_path / "cache")
    second = replace(first, run_dir=str(tmp_path / "second"))
    run_world(2, _sft, first)
    run_world(2, _sft, second)
    assert sum(_metric(first, "vision/encoded_patches")) > 0
    assert _metric(second, "vision/encoded_patches") == [0.0] * 3
    assert min(_metric(second, "vision/cached_patches")) > 0
    assert _metric(second, "sft/nll") == _metric(first, "sft/nll"), "not the same to the bit"


def test_the_cache_is_filled_ahead_and_the_job_goes_on_where_it_was(
    tiny_checkpoint: Path, tiny_videos: Path, tmp_path: Path
) -> None:
    cfg = _recipe(tiny_checkpoint, tiny_videos, tmp_path / "run", tmp_path / "cache")
    some = replace(cfg, data=replace(cfg.data, eval=""))
    [part, _] = run_world(2, lambda _: fill(some))
    [rest] = run_world(1, lambda _: fill(cfg))
    num_train, num_eval = 8, 4
    per_video = part["vision/encoded_patches"] / num_train
    assert rest["vision/encoded_patches"] == per_video * num_eval
    assert rest["vision/cached_patches"] == per_video * num_train
    run_world(2, _sft, cfg)
    assert _metric(cfg, "vision/encoded_patches") == [0.0] * 3
