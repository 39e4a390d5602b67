# SPDX-License-Identifier: Apache-2.0
"""How fast frames come out of long videos: `scripts/bench/decode.py --json PATH [--peers DIR]`.

Ours against torchcodec, PyAV, decord, OpenCV and DALI's reader, each at its best, and against the limit: libavcodec
given exactly the packets of our plan, already in memory, without colour conversion. Everything else starts from the
file's name: opening, indexing, decoding, RGB. All methods run in turn in one process; medians of the rounds are shown,
as ratios to the best peer and to the limit (in brackets with the file's index already made, as it is when a prompt
has been built). Peers that are not installed are left out; `--peers` names a folder that
holds some (`pip install --no-deps --target DIR torchcodec==0.13.0 decord==0.6.0`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.frame import PictureType

from data.video import index_store
from data.video.decode import PacketReader
from data.video.gop_plan import GopRun, plan_runs, split_runs
from data.video.index import VideoIndex
from data.video.index_store import index_video
from data.video.pixels import CpuVideoDecoder, read_frames
from megatron_rl.runtime.files import write_atomically, written_atomically

FPS = 30
ENCODERS = {
    "h264_g30": ("libx264", "mp4", {"preset": "fast", "g": "30", "keyint_min": "30", "sc_threshold": "0"}),
    "h264_g250": ("libx264", "mp4", {"preset": "fast", "g": "250", "keyint_min": "250", "sc_threshold": "0"}),
    "vp9_g250": ("libvpx-vp9", "webm", {"g": "250", "deadline": "realtime", "cpu-used": "8"}),
}
OURS, INDEXED, LIMIT = "ours", "ours indexed", "limit"
Method = Callable[[str, list[int], int], object]
"""(path, frame numbers, threads) -> the frames"""


@dataclass(frozen=True)
class Result:
    """Medians of one method on one file, over the rounds. `error` = mean difference from ours, of 255 levels."""

    file: str
    frames: str
    threads: int
    resized: bool
    method: str
    wall: float
    cpu: float
    error: float


# -------------------------------------------------------------------------------------------------------------- files


def make_video(path: Path, kind: str, size: str, seconds: int) -> None:
    """FFmpeg's test picture "testsrc2" in this codec."""
    encoder, container_format, options = ENCODERS[kind]
    width, height = map(int, size.split("x"))
    with written_atomically(path) as scratch, av.open(str(scratch), "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 0 if encoder == "libx264" else 400_000 * width * height // 76_800
        for frame in _test_pictures(size, seconds):
            picture = frame.reformat(format="yuv420p")
            picture.pict_type = PictureType.NONE  # as it comes, every picture asks to be a keyframe
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _test_pictures(size: str, seconds: int) -> Iterator[av.VideoFrame]:
    graph = Graph()
    graph.add("testsrc2", f"size={size}:rate={FPS}:duration={seconds}").link_to(graph.add("buffersink"))
    graph.configure()
    for _ in range(seconds * FPS):
        frame = graph.pull()
        assert isinstance(frame, av.VideoFrame)
        yield frame


# ------------------------------------------------------------------------------------------------------------ methods


def ours(path: str, frames: list[int], threads: int) -> object:
    index_store._index.cache_clear()
    return read_frames(path, frames, threads)


def ours_indexed(path: str, frames: list[int], threads: int) -> object:
    """The second time: the packets of the file are known."""
    return read_frames(path, frames, threads)


class Limit:
    """libavcodec on the packets of our plan, which were read beforehand."""

    def __init__(self) -> None:
        self._packets: dict[tuple[str, int], list[av.Packet]] = {}

    def prepare(self, path: str, frames: list[int]) -> None:
        self._packets.clear()
        index = index_video(path)
        for run in plan_runs(index, frames):
            self._packets[path, run.start] = list(_fed(index, run))

    def __call__(self, path: str, frames: list[int], threads: int) -> object:
        parts = split_runs(plan_runs(index_video(path), frames), threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: self._decode(path, part), parts))
        return None

    def _decode(self, path: str, runs: Sequence[GopRun]) -> None:
        with av.open(path) as container:
            context = container.streams.video[0].codec_context
            context.thread_count = 1
            for run in runs:
                for packet in self._packets[path, run.start]:
                    context.decode(packet)
                context.decode(None)
                context.flush_buffers()


def _fed(index: VideoIndex, run: GopRun) -> Iterator[av.Packet]:
    with PacketReader(index) as reader:
        for number, packet in reader.packets(run.start, run.stop):
            if packet is not None and (packet.pts in run.wanted or not index.is_droppable[number]):
                yield packet


def pyav_sequential(path: str, frames: list[int], threads: int) -> object:
    wanted, found = set(frames), []
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = threads
        container.streams.video[0].codec_context.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if number == frames[-1]:
                break
    return np.stack(found)


def pyav_seek(path: str, frames: list[int], threads: int) -> object:
    found = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO"
        for number in frames:
            target = round(number / FPS / float(stream.time_base or 1))
            container.seek(target, stream=stream)
            frame = next(f for f in container.decode(stream) if f.pts is not None and f.pts >= target)
            found.append(frame.to_ndarray(format="rgb24"))
    return np.stack(found)


def torchcodec_exact(path: str, frames: list[int], threads: int) -> object:
    decoders = importlib.import_module("torchcodec.decoders")  # not among what the project needs
    decoder = decoders.VideoDecoder(path, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=threads)
    return decoder.get_frames_at(frames).data.numpy()


def decord_batch(path: str, frames: list[int], threads: int) -> object:
    os.environ["DECORD_EOF_RETRY_MAX"] = "40960"  # it gives up on long groups of pictures otherwise
    return importlib.import_module("decord").VideoReader(path, num_threads=threads).get_batch(frames).asnumpy()


def opencv_grab(path: str, frames: list[int], threads: int) -> object:
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    wanted, found = set(frames), []
    for number in range(frames[-1] + 1):
        capture.grab()
        if number in wanted:
            found.append(capture.retrieve()[1][:, :, ::-1])
    return np.stack(found)


def dali_reader(path: str, frames: list[int], threads: int) -> object:
    """Frames as `uniform_sample` of DALI's seeking reader chooses them: the same for evenly spaced ones."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=1, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        video = fn.experimental.readers.video(
            device="cpu", filenames=[path], sequence_length=len(frames), uniform_sample=True
        )
        pipeline.set_outputs(video)
    pipeline.build()
    return np.array(pipeline.run()[0][0])


PEERS: dict[str, tuple[str, Method]] = {
    "torchcodec": ("torchcodec", torchcodec_exact),
    "decord": ("decord", decord_batch),
    "pyav seek": ("av", pyav_seek),
    "pyav sequential": ("av", pyav_sequential),
    "opencv": ("cv2", opencv_grab),
    "dali reader": ("nvidia.dali", dali_reader),
}


def available(kind: str, names: Sequence[str]) -> dict[str, Method]:
    """Installed peers. DALI's CPU build has no H.264."""
    return {
        name: method
        for name, (module, method) in PEERS.items()
        if name in names
        and importlib.util.find_spec(module.split(".")[0]) is not None
        and not (name == "dali reader" and kind.startswith("h264"))
    }


def resized(method: Method, size_hw: tuple[int, int]) -> Method:
    """A peer's full-size frames, then torch's antialiased bicubic resize in batches."""

    def run(path: str, frames: list[int], threads: int) -> object:
        pixels = torch.from_numpy(np.ascontiguousarray(method(path, frames, threads))).permute(0, 3, 1, 2)
        parts = [torch.nn.functional.interpolate(p, size_hw, mode="bicubic", antialias=True) for p in pixels.split(32)]
        return torch.cat(parts)

    return run


def ours_resized(size_hw: tuple[int, int]) -> Method:
    def run(path: str, frames: list[int], threads: int) -> object:
        index_store._index.cache_clear()
        return CpuVideoDecoder(threads).decode(path, frames, size_hw)

    return run


# ---------------------------------------------------------------------------------------------------------- measuring


def choose(count: str, total: int) -> list[int]:
    """ "64": so many, evenly; "fps2": two a second."""
    if count.startswith("fps"):
        return list(range(0, total, round(FPS / float(count[3:]))))
    return np.linspace(0, total - 1, int(count)).round().astype(int).tolist()


def measure(
    path: str, count: str, threads: int, methods: dict[str, Method], rounds: int, is_resized: bool
) -> Iterator[Result]:
    """Rounds in which every method has its turn, in an order that changes."""
    frames = choose(count, index_video(path).num_frames)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    reference: np.ndarray | None = None
    if isinstance(limit := methods.get(LIMIT), Limit):
        limit.prepare(path, frames)
    for turn in range(rounds):
        names = list(methods)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            result = methods[name](path, frames, threads)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            if result is not None and name not in errors:
                sample = np.asarray(result)[..., ::8, ::8] if is_resized else np.asarray(result)[:, ::8, ::8]
                sample = sample.astype(np.int16)
                reference = sample if name == OURS else reference
                errors[name] = float("nan") if reference is None else float(np.abs(sample - reference).mean())
            del result
    for name, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield Result(Path(path).stem, count, threads, is_resized, name, wall, cpu, errors.get(name, 0.0))


def table(results: Sequence[Result]) -> str:
    """One line per file, frames and threads: ours, the peer that is first on the wall clock, and ratios (wall/CPU)."""
    lines = [
        f"{'file':26}{'frames':>7}{'thr':>4}  {'ours wall/cpu':>15}  {'best peer wall/cpu':>30}"
        f"{'peer/ours':>12}{'ours/limit (indexed)':>24}"
    ]
    for key in dict.fromkeys((r.file, r.frames, r.threads) for r in results):
        group = {r.method: r for r in results if (r.file, r.frames, r.threads) == key}
        mine, limit = group[OURS], group.get(LIMIT)
        peers = [r for name, r in group.items() if name not in (OURS, INDEXED, LIMIT)]
        best = min(peers, key=lambda r: r.wall, default=None)
        shown = f"{best.method} {best.wall:.2f}/{best.cpu:.2f}" if best else "-"
        ratio = f"{best.wall / mine.wall:.2f}/{min(r.cpu for r in peers) / mine.cpu:.2f}" if best else "-"
        over = f"{mine.wall / limit.wall:.2f}/{mine.cpu / limit.cpu:.2f}" if limit else "-"
        over += f" ({group[INDEXED].wall / limit.wall:.2f}/{group[INDEXED].cpu / limit.cpu:.2f})" if limit else ""
        own = f"{mine.wall:.2f}/{mine.cpu:.2f}"
        lines.append(f"{key[0]:26}{key[1]:>7}{key[2]:>4}  {own:>15}  {shown:>30}{ratio:>12}{over:>24}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure video decoding against other libraries and the limit.")
    parser.add_argument("--json", type=Path, required=True, help="file to write all results to")
    parser.add_argument("--videos", type=Path, default=Path("runs/bench_decode"), help="folder for the test videos")
    parser.add_argument("--seconds", type=int, default=600, help="length of the test videos (default: 600)")
    parser.add_argument("--kinds", default=",".join(ENCODERS), help="of " + ", ".join(ENCODERS))
    parser.add_argument("--sizes", default="320x240,1280x720", help="picture sizes")
    parser.add_argument("--frames", default="64,256,512,fps2", help="numbers of frames; fps2 = two a second")
    parser.add_argument("--threads", default="1,2", help="numbers of threads")
    parser.add_argument("--methods", default=",".join(PEERS), help="peers to run, of " + ", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median is shown (default: 3)")
    parser.add_argument("--resize", default="224x308", help="height x width of the second table; empty = none")
    parser.add_argument("--peers", type=Path, help="folder with peers that are not installed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.peers:
        sys.path.append(str(args.peers))
    torch.set_num_threads(1)
    args.videos.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for size in args.sizes.split(","):
        for kind in args.kinds.split(","):
            path = args.videos / f"{kind}_{size}_{args.seconds}s.{ENCODERS[kind][1]}"
            if not path.is_file():
                print(f"making {path}", flush=True)
                make_video(path, kind, size, args.seconds)
            for result in run_file(args, str(path), kind):
                results.append(result)
                write_atomically(args.json, (json.dumps([asdict(r) for r in results], indent=1) + "\n").encode())
    for is_resized in (False, True):
        part = [result for result in results if result.resized == is_resized]
        if part:
            print(f"\n{'resized to ' + args.resize if is_resized else 'full size'}, medians of {args.rounds} rounds, s")
            print(table(part))


def run_file(args: argparse.Namespace, path: str, kind: str) -> Iterator[Result]:
    peers = available(kind, args.methods.split(","))
    for count in args.frames.split(","):
        for threads in map(int, args.threads.split(",")):
            here = {
                name: peer for name, peer in peers.items() if not (name == "dali reader" and count.startswith("fps"))
            }
            methods: dict[str, Method] = {OURS: ours, INDEXED: ours_indexed, **here, LIMIT: Limit()}
            full_size = list(measure(path, count, threads, methods, args.rounds, False))
            print(table(full_size).splitlines()[-1], flush=True)
            yield from full_size
            if args.resize:
                height, width = map(int, args.resize.split("x"))
                methods = {name: resized(peer, (height, width)) for name, peer in here.items()}
                methods = {OURS: ours_resized((height, width)), **methods}
                yield from measure(path, count, threads, methods, args.rounds, True)


if __name__ == "__main__":
    main()
