# SPDX-License-Identifier: Apache-2.0
"""Video embeddings: who encodes what, who receives what, and what reuse saves: `scripts/bench/vision.py --json PATH`.

Forks its own ranks; tower, language model, attention and decoder are real, weights random, in the proportions of
Qwen2.5-VL-7B. First one long video is encoded on 1, 2 and 4 ranks: patches and bytes of each rank are counted. Then the
passes of a training step are timed on growing numbers of frames, variants interleaved, and set against Long-RL's
published figure at the same number of frames. Generation and decoding are left out of every variant: they are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not spoil it for forked ranks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, also under PYTHONSAFEPATH

from megatron_rl.runtime.quiet import quiet_libraries

quiet_libraries()

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data.video.open_decoder import build_video_decoder
from data.video.prefetch import FramePrefetcher
from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import choose_backend
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.grid import Grid
from megatron_rl.training.batch import ScoredBatch, pack
from megatron_rl.training.microbatch import MicroBatch, localize
from megatron_rl.training.policy import Hyperparameters, Policy
from megatron_rl.types import MediaItem
from model_providers.provider import open_provider
from scripts.bench.vision_parts import RESPONSE_TOKENS, EncodedOnUse, Frames, artifact, make_groups, write_checkpoint
from scripts.bench.world import enter, fork_world
from scripts.make_videos import encode as write_video

WORLD, PROMPTS = 2, 2
# Seconds of a step in Long-RL's figure (assets/Efficiency-comparison2.png), by frames: without MR-SP, and the better of
# its two lines with it.
FRAMES = (8, 16, 32, 64, 128, 256, 512)
LONG_RL = {
    "Qwen2.5-VL-7B": ((119, 139, 151, 164, 201, 320, 439), (30, 37, 42, 42, 65, 110, 205)),
    "LongVILA-R1-7B": ((147, 161, 160, 257, 283, 371, 576), (54, 54, 57, 121, 134, 175, 278)),
}
LABELS = {
    "every_pass": "(a) encode in every pass, for every response",
    "reused": "(b) encode once, reused",
    "reused_cp": "(c) reused, context parallel",
    "ours": "ours: reused, prompt stored once",
    "ours_cp": "ours, context parallel",
}


@dataclass(frozen=True)
class VisionSetting:
    """What is measured. `frames` of the timed steps; `video_frames` of the video that is encoded by 1, 2, 4 ranks."""

    frames: tuple[int, ...]
    video_frames: int
    responses: int
    repeat: int
    side: int
    """Of a frame, in pixels; 168 makes 144 patches and 36 tokens of two frames."""


# -------------------------------------------------------------------------------------------------------------- set-up


def join(rank: int, world: int, port: int, context: int = 1) -> parallel.ParallelMesh:
    enter(rank, world, port)
    return parallel.initialize(choose_backend("cpu", "float32"), Grid(world, context=context), Grid(world))


# ---------------------------------------------------------------------------------------------- one video on many ranks


def encode_one_video(rank: int, world: int, port: int, folder: str, video: MediaItem, out: str) -> None:
    """Every rank is a context parallel rank, so that it wants its part of one micro-batch."""
    mesh = join(rank, world, port, context=world)
    provider, backend = open_provider(folder), choose_backend("cpu", "float32")
    media_encoder = provider.build_encoder(backend, torch.device("cpu"))
    frames = FramePrefetcher(build_video_decoder(backend.decoder_device, 1), 0)
    assert media_encoder is not None
    cache = ParallelEncoder(media_encoder, frames)
    batches = pack(make_groups(provider, [video], 2), 1, 1 << 20, provider, mesh)[0].batches
    _, wanted = localize(batches)
    dist.barrier()
    start = time.perf_counter()
    cache.encode([video])
    seconds = parallel.reduce_max(time.perf_counter() - start)
    encoded = cache.take_counts().encoded_patches
    cache.fetch_tokens(wanted)
    to_owner = cache.take_counts().received_bytes
    cache.fetch([video])
    whole = cache.take_counts().received_bytes
    asked = sum(stop - first for runs in wanted.values() for first, stop in runs)
    row = {"encoded_patches": encoded, "tokens": asked, "bytes_to_owner": to_owner, "bytes_of_whole_video": whole}
    rows = parallel.gather_lists([row])
    if rank == 0:
        Path(out).write_text(json.dumps({"ranks": rows, "seconds": seconds}))
    dist.barrier()


def measure_encoding(folder: str, scratch: Path, num_frames: int, side: int) -> list[dict[str, Any]]:
    path = scratch / "long.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (num_frames, 64, 64, 3), dtype=np.uint8), "h264")
    video, results = artifact(str(path), num_frames, side), []
    patches = video.grid_thw[0] * video.grid_thw[1] * video.grid_thw[2]
    for world in (1, 2, 4):
        fork_world(world, encode_one_video, folder, video, str(scratch / "encoded.json"))
        record = json.loads((scratch / "encoded.json").read_text())
        most = max(row["encoded_patches"] for row in record["ranks"])
        results.append({"world": world, "work_over_even_share": most * world / patches, **record})
    return results


# ------------------------------------------------------------------------------------------------- the passes of a step


class Step:
    """The passes of one training step on this rank, in each variant."""

    def __init__(self, folder: str, mesh: parallel.ParallelMesh, num_frames: int, setting: VisionSetting):
        self._mesh, self._provider = mesh, open_provider(folder)
        backend = choose_backend("cpu", "float32")
        model = self._provider.build_language(backend, mesh)
        self._provider.load_language(model, mesh)
        hyper = Hyperparameters(1e-6, (0.9, 0.999), 1e-8, 0.0, 0, 1.0)
        self._policy = Policy(model, backend, mesh, hyper)
        media_encoder = self._provider.build_encoder(backend, torch.device("cpu"))
        assert media_encoder is not None
        self._media_encoder = media_encoder
        self.videos = [artifact(f"video {i}", num_frames, setting.side) for i in range(PROMPTS)]
        generator = torch.Generator().manual_seed(0)
        shape = (num_frames, 3, setting.side, setting.side)
        self._frames = {
            v.path: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for v in self.videos
        }
        self._cache = ParallelEncoder(self._media_encoder, FramePrefetcher(Frames(self._frames), 0))
        self._groups = make_groups(self._provider, self.videos, setting.responses)
        self.num_encoded = 0

    def every_pass(self) -> None:
        """The rollout encodes each prompt's video; the training passes do it again for every response."""
        for video in self.videos[self._mesh.here.dp :: self._mesh.trainer.data]:
            self._encode_whole(video.key)
        made = EncodedOnUse(self._encode_whole, [v.key for v in self.videos])
        self._train(self._pack(share_prefix=False), made, scores_old=True)

    def reused(self) -> None:
        self._reuse(share_prefix=False, scores_old=True)

    def ours(self) -> None:
        """As the loop does it: the prompt of a group once, and no second pass for what the update computes anyway."""
        self._reuse(share_prefix=True, scores_old=False)

    def _reuse(self, share_prefix: bool, scores_old: bool) -> None:
        self._cache.forget()
        self._cache.encode(self.videos)
        self._cache.fetch(self.videos[parallel.local_rank() :: WORLD])  # what the rollout replica of this rank takes
        batches, wanted = localize(self._pack(share_prefix))
        self._train(batches, self._cache.fetch_tokens(wanted).tables, scores_old)
        self.num_encoded += self._cache.take_counts().encoded_patches

    def _pack(self, share_prefix: bool) -> list[MicroBatch]:
        longest = max(s.num_tokens for group in self._groups for s in group)
        budget = longest + (len(self._groups[0]) - 1) * RESPONSE_TOKENS if share_prefix else longest
        return pack(self._groups, 1, budget, self._provider, self._mesh, share_prefix=share_prefix)[0].batches

    def _train(self, batches: Sequence[MicroBatch], embeds: Mapping[str, Tensor], scores_old: bool) -> None:
        """Old (where the update does not give it), reference, update."""
        ref = self._policy.logprobs(batches, embeds)
        old = self._policy.logprobs(batches, embeds) if scores_old else [None] * len(batches)
        scored = [
            ScoredBatch(b, o, r, torch.ones_like(b.rollout_logprobs)) for b, o, r in zip(batches, old, ref, strict=True)
        ]
        self._policy.train(scored, embeds, PpoClip(kl_coef=0.1), step=0)

    def _encode_whole(self, key: str) -> Tensor:
        video = next(v for v in self.videos if v.key == key)
        self.num_encoded += video.grid_thw[0] * video.grid_thw[1] * video.grid_thw[2]
        return torch.cat([self._media_encoder.encode(part) for part in self._frames[video.path].split(64)])


class Grids:
    """Two layouts of the trainer in the same processes, so that their steps can take turns.

    Megatron-core keeps its groups in module variables; these are exchanged.
    """

    def __init__(self, rank: int, world: int, port: int):
        unset = self._variables()
        self._saved = {}
        self.meshes = {}
        for context in (1, world):
            vars(parallel_state).update(unset)
            self.meshes[context] = join(rank, world, port, context)
            self._saved[context] = self._variables()

    def enter(self, context: int) -> None:
        vars(parallel_state).update(self._saved[context])

    @staticmethod
    def _variables() -> dict[str, Any]:
        return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name.isupper()}


VARIANTS = {  # context parallel size, method of Step
    "every_pass": (1, Step.every_pass),
    "reused": (1, Step.reused),
    "reused_cp": (WORLD, Step.reused),
    "ours": (1, Step.ours),
    "ours_cp": (WORLD, Step.ours),
}


def time_steps(
    rank: int, world: int, port: int, folder: str, num_frames: int, setting: VisionSetting, out: str
) -> None:
    """Variants interleaved; the slowest rank's seconds, and the patches that all ranks encoded in one step."""
    grids, steps = Grids(rank, world, port), {}
    for context, mesh in grids.meshes.items():
        grids.enter(context)
        steps[context] = Step(folder, mesh, num_frames, setting)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    patches: dict[str, int] = {}
    for turn in range(1 + setting.repeat * (3 if num_frames < 64 else 1)):  # short steps are the noisier ones
        for name, (context, run) in VARIANTS.items():
            grids.enter(context)
            step = steps[context]
            step.num_encoded = 0
            dist.barrier()
            start = time.perf_counter()
            run(step)
            elapsed = parallel.reduce_max(time.perf_counter() - start)
            patches[name] = sum(parallel.gather_lists([step.num_encoded]))
            seconds[name] += [elapsed] if turn else []  # the first one warms up
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ranges = {name: [min(values), max(values)] for name, values in seconds.items()}
        Path(out).write_text(json.dumps({"seconds": medians, "ranges": ranges, "encoded_patches": patches}))
    dist.barrier()


def measure_steps(folder: str, scratch: Path, setting: VisionSetting) -> list[dict[str, Any]]:
    rows = []
    for num_frames in setting.frames:
        fork_world(WORLD, time_steps, folder, num_frames, setting, str(scratch / "steps.json"))
        record = json.loads((scratch / "steps.json").read_text())
        rows.append({"frames": num_frames, **record, **relative(num_frames, record["seconds"])})
        print(render_row(rows[-1]), flush=True)
    return rows


def relative(num_frames: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Each variant's time over (a)'s, and whether the better of ours is under Long-RL's best line at that length."""
    ratios = {name: value / seconds["every_pass"] for name, value in seconds.items()}
    best = min(ratios["ours"], ratios["ours_cp"])
    theirs = {}
    if num_frames in FRAMES:
        at = FRAMES.index(num_frames)
        theirs = {model: with_it[at] / without[at] for model, (without, with_it) in LONG_RL.items()}
    return {
        "over_every_pass": ratios,
        "best_of_ours": best,
        "long_rl_best": theirs,
        "under_long_rl": bool(theirs) and all(best <= ratio for ratio in theirs.values()),
    }


# -------------------------------------------------------------------------------------------------------------- reports


def render_encoding(results: Sequence[Mapping[str, Any]], num_frames: int) -> str:
    lines = [f"one video of {num_frames} frames", "ranks  patches by rank          bytes to the owners      seconds"]
    for record in results:
        patches = " ".join(str(row["encoded_patches"]) for row in record["ranks"])
        received = " ".join(str(row["bytes_to_owner"]) for row in record["ranks"])
        lines.append(f"{record['world']:5}  {patches:23}  {received:23}  {record['seconds']:.2f}")
    return "\n".join(lines)


def render_row(row: Mapping[str, Any]) -> str:
    ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in row["over_every_pass"].items())
    theirs = "  ".join(f"{model} {ratio:.3f}" for model, ratio in row["long_rl_best"].items())
    return f"{row['frames']:5} frames, time over (a): {ratios}; Long-RL's best over its own: {theirs}"


def parse_arguments() -> tuple[VisionSetting, Path]:
    parser = argparse.ArgumentParser(description="Video embeddings: work, bytes and times, in one run.")
    parser.add_argument("--json", type=Path, required=True, help="where all figures go")
    parser.add_argument(
        "--frames", default=",".join(map(str, FRAMES)), help="of the timed steps (default: %(default)s)"
    )
    parser.add_argument("--video-frames", type=int, default=512, help="of the video encoded by 1, 2, 4 ranks")
    parser.add_argument("--responses", type=int, default=5, help="to each prompt (default: 5)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each variant (default: 3)")
    parser.add_argument("--side", type=int, default=168, help="of a frame in pixels, a multiple of 56 (default: 168)")
    args = parser.parse_args()
    frames = tuple(int(part) for part in args.frames.split(","))
    return VisionSetting(frames, args.video_frames, args.responses, args.repeat, args.side), args.json


def main() -> None:
    setting, json_path = parse_arguments()
    tokens_per_frame = (setting.side // 28) ** 2 // 2
    longest = max(*setting.frames, setting.video_frames) * tokens_per_frame + 128
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = str(scratch / "model")
        write_checkpoint(Path(checkpoint), longest)
        encoding = measure_encoding(checkpoint, scratch, setting.video_frames, setting.side)
        print(render_encoding(encoding, setting.video_frames), flush=True)
        record = {"setting": asdict(setting), "labels": LABELS, "encoding": encoding}
        record["steps"] = measure_steps(checkpoint, scratch, setting)
    write_atomically(json_path, (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
