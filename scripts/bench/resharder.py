# SPDX-License-Identifier: Apache-2.0
"""Weight sync, ours and the usual ways, side by side in one run: `scripts/bench/resharder.py --json PATH`.

Forks its own ranks, or takes its place in the world of torchrun when RANK is set. Trainer and engine are real, weights
random. Variants are interleaved and every one must leave the engine as vLLM's own loader does. Times are ratios of
medians; bytes and memory are counted in a pass of its own, so that counting costs no time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not spoil it for forked ranks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, also under PYTHONSAFEPATH

from megatron_rl.runtime.quiet import quiet_libraries

quiet_libraries()

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.protocols import ModelProvider
from megatron_rl.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import Backend, choose_backend
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import build_plan
from megatron_rl.weight_sync.resharder import Resharder
from megatron_rl.weight_sync.shape_check import check_fit
from model_providers.provider import open_provider
from model_providers.weight_map import HfTensor
from scripts.bench.baselines import BUCKET_BYTES, CoreResharding, FullGather, LiveBytes, ReceivedBytes, as_matrix
from scripts.bench.world import enter, fork_world
from scripts.make_tiny_checkpoint import make_config, make_processor, make_tokenizer

HEAD_DIM, NUM_KV_HEADS, VOCAB_SIZE = 64, 4, 8192
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
OURS, LIMIT = "ours", "memcpy"
LABELS = {
    OURS: "shard to shard (ours)",
    "full_gather_per_tensor": "full gather per tensor, load_weights",
    "full_gather_bucketed": "full gather in buckets, load_weights",
    "core_resharding": "megatron.core.resharding, local copy",
    LIMIT: "memcpy of the needed bytes",
}


@dataclass(frozen=True, slots=True)
class SyncSetting:
    world: int
    tensor: int
    pipeline: int
    rollout_tensor: int
    megabytes: int
    repeat: int
    device: str
    buffer_bytes: int


@dataclass(frozen=True, slots=True)
class Bench:
    """One rank's models, and the ways to bring the trainer's weights into the engine."""

    backend: Backend
    target: dict[str, Tensor]
    expected: dict[str, Tensor]
    variants: Mapping[str, Callable[[], object]]
    resident: dict[str, int]
    """Bytes a variant keeps between syncs beside trainer and engine."""


def hidden_size(megabytes: int, num_layers: int, itemsize: int) -> int:
    """The smallest width, in whole groups of heads, whose language model takes at least that many bytes."""
    hidden = step = HEAD_DIM * NUM_KV_HEADS
    while itemsize * (num_layers * (14 * hidden**2 + 2 * step * hidden) + 2 * VOCAB_SIZE * hidden) < megabytes << 20:
        hidden += step
    return hidden


def write_model_folder(folder: Path, hidden: int, num_layers: int) -> None:
    """Config, tokenizer and processor of a Qwen2.5-VL with few and wide layers, without weights."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]  # else vLLM takes it for an embedding model
    text: Any = config.text_config
    text.vocab_size, text.hidden_size, text.intermediate_size = VOCAB_SIZE, hidden, 4 * hidden
    text.num_hidden_layers, text.num_attention_heads = num_layers, hidden // HEAD_DIM
    text.num_key_value_heads = NUM_KV_HEADS
    text.layer_types = ["full_attention"] * num_layers
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    vision: Any = config.vision_config
    vision.out_hidden_size = hidden
    config.save_pretrained(folder)
    processor = make_processor(tokenizer)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def random_tensor(hf: HfTensor, dtype: torch.dtype) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(hf.name.encode()))
    return torch.rand(hf.shape, generator=generator).to(dtype)


@torch.no_grad()
def fill_trainer(provider: Any, model: Any, mesh: parallel.ParallelMesh) -> None:
    for name, param in model.named_weights().items():
        entry = provider.weight_map[name]
        shard = entry.layout.trainer(entry.hf, mesh.here.tp, mesh.trainer.tensor)
        full = {hf.name: random_tensor(hf, param.dtype) for hf in entry.hf}
        local = as_matrix(param.data.zero_())
        for block in shard.blocks:
            local[block.local_slices].copy_(as_matrix(full[block.hf])[block.hf_slices])


def build(setting: SyncSetting, folder: Path) -> Bench:
    backend = choose_backend(setting.device)
    provider = open_provider(folder)
    middle = build_middle(setting, backend, provider)
    world = parallel.world_size()
    grid = Grid(world, tensor=setting.tensor, pipeline=setting.pipeline)
    mesh = parallel.initialize(backend, grid, Grid(world, tensor=setting.rollout_tensor))
    trainer = provider.build_language(backend, mesh)
    fill_trainer(provider, trainer, mesh)
    engine = build_engine(setting, backend, provider)
    source = {name: param.data for name, param in trainer.named_weights().items()}
    target = engine.parameters()
    shape, table = provider.shape, provider.weight_map
    check_fit(table, mesh.trainer, mesh.engine, mesh.rank, source, target)
    engine.load_hf((hf.name, random_tensor(hf, backend.dtype)) for hf in table.hf_tensors().values())
    expected = {name: param.clone() for name, param in target.items()}

    plan = build_plan(table, shape.num_layers, mesh.trainer, mesh.engine)
    resharder = Resharder(plan, mesh.rank, source, target, setting.buffer_bytes)
    per_tensor = FullGather(table, shape.num_layers, mesh.trainer, source, bucket_bytes=0)
    bucketed = FullGather(table, shape.num_layers, mesh.trainer, source, BUCKET_BYTES)
    middle_weights = {name: param.data for name, param in middle.named_weights().items()}
    core = CoreResharding(trainer, middle, middle_weights, backend.device)
    copies = core.copies(table, mesh.engine_tp_rank, mesh.engine.tensor, target)
    variants = {
        OURS: lambda: resharder.sync(0),
        "full_gather_per_tensor": lambda: per_tensor.run(engine.load_hf),
        "full_gather_bucketed": lambda: bucketed.run(engine.load_hf),
        "core_resharding": lambda: core.run(copies),
        LIMIT: lambda: torch._foreach_copy_(list(target.values()), list(expected.values())),
    }
    return Bench(backend, target, expected, variants, {"core_resharding": num_bytes(middle_weights)})


def build_middle(setting: SyncSetting, backend: Backend, provider: Any) -> Any:
    """A Megatron model in the engine's layout, for Megatron-core's resharder. It keeps the groups it was built with."""
    from megatron.core import parallel_state

    grid = Grid(parallel.world_size(), tensor=setting.rollout_tensor)
    mesh = parallel.initialize(backend, grid, grid)
    middle = provider.build_language(backend, mesh)
    parallel_state.destroy_model_parallel()
    return middle


def build_engine(setting: SyncSetting, backend: Backend, provider: ModelProvider) -> VllmEngine:
    settings = EngineSettings(
        model=provider.engine,
        tensor=setting.rollout_tensor,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    engine = VllmEngine(settings, backend, (), (), provider.position_ids, lambda ids: "")
    engine.wake("weights")
    return engine


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@torch.no_grad()
def measure(bench: Bench, repeat: int) -> dict[str, dict[str, Any]]:
    """Per variant, this rank's figures. The first pass counts and warms up; it is not timed."""
    figures = {name: counted(bench, name) for name in bench.variants}
    seconds: dict[str, list[float]] = {name: [] for name in bench.variants}
    names = list(bench.variants)
    for index in range(repeat):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            seconds[name].append(timed(bench, name))
    for name, figure in figures.items():
        figure["seconds"] = seconds[name]
    return figures


def prepare(bench: Bench) -> None:
    for param in bench.target.values():
        param.fill_(7.0)
    gc.collect()
    synchronize(bench)


def synchronize(bench: Bench) -> None:
    if bench.backend.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def counted(bench: Bench, name: str) -> dict[str, Any]:
    prepare(bench)
    bench.variants[name]()  # plans are made and connections opened by the first run
    prepare(bench)
    with ReceivedBytes() as received, LiveBytes() as memory:
        bench.variants[name]()
    equal = all(torch.equal(param, bench.expected[key]) for key, param in bench.target.items())
    return {
        "bytes_received": received.total,
        "num_messages": received.num_messages,
        "peak_extra_bytes": memory.peak,
        "resident_extra_bytes": bench.resident.get(name, 0),
        "bit_equal": equal,
    }


def timed(bench: Bench, name: str) -> float:
    """Until the last rank is done."""
    prepare(bench)
    start = time.perf_counter()
    bench.variants[name]()
    synchronize(bench)
    return time.perf_counter() - start


def summarize(setting: SyncSetting, replica_bytes: int, ranks: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """All ranks' figures as one record. Times only as ratios: seconds of a shared machine mean nothing elsewhere."""
    medians = {name: statistics.median(ranks[0][name]["seconds"]) for name in ranks[0]}
    totals = {name: sum(rank[name]["bytes_received"] for rank in ranks) for name in ranks[0]}
    variants = {}
    for name in ranks[0]:
        figures = [rank[name] for rank in ranks]
        variants[name] = {
            "bytes_received": [f["bytes_received"] for f in figures],
            "bytes_ratio": totals[name] / totals[OURS] if totals[OURS] else None,
            "messages_received": max(f["num_messages"] for f in figures),
            "seconds_ratio": medians[name] / medians[OURS],
            "seconds_ratio_range": spread(ranks[0][name]["seconds"], ranks[0][OURS]["seconds"]),
            "over_limit": medians[name] / medians[LIMIT],
            "peak_extra_bytes": max(f["peak_extra_bytes"] for f in figures),
            "resident_extra_bytes": max(f["resident_extra_bytes"] for f in figures),
            "bit_equal": all(f["bit_equal"] for f in figures),
        }
    return {
        "setting": asdict(setting),
        "replica_bytes": replica_bytes,
        "buffer_bytes": setting.buffer_bytes,
        "buffer_bound_respected": variants[OURS]["peak_extra_bytes"] <= setting.buffer_bytes,
        "variants": variants,
    }


def spread(seconds: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Least and largest ratio within one round of the interleaved repeats."""
    ratios = [mine / base for mine, base in zip(seconds, ours, strict=True)]
    return min(ratios), max(ratios)


def render(record: dict[str, Any]) -> str:
    setting = record["setting"]
    lines = [
        f"{setting['world']} ranks, TP{setting['tensor']} PP{setting['pipeline']} -> vLLM TP{setting['rollout_tensor']}"
        f" x {setting['world'] // setting['rollout_tensor']}, {record['replica_bytes'] / 1e6:.0f} MB a replica,"
        f" medians of {setting['repeat']}",
        "",
        f"{'':<40}{'received MB':>13}{'bytes':>8}{'seconds':>9}{'over':>9}{'extra MB':>11}{'bit':>7}",
        f"{'':<40}{'a rank (max)':>13}{'/ ours':>8}{'/ ours':>9}{'memcpy':>9}{'at peak':>11}{'equal':>7}",
    ]
    for name, f in record["variants"].items():
        ratio = "-" if f["bytes_ratio"] is None else f"{f['bytes_ratio']:.2f}"
        extra = f["peak_extra_bytes"] + f["resident_extra_bytes"]
        lines.append(
            f"{LABELS[name]:<40}{max(f['bytes_received']) / 1e6:>13.1f}{ratio:>8}{f['seconds_ratio']:>9.2f}"
            f"{f['over_limit']:>9.2f}{extra / 1e6:>11.1f}{'yes' if f['bit_equal'] else 'NO':>7}"
        )
    kept = "within" if record["buffer_bound_respected"] else "BEYOND"
    lines += ["", f"peak extra memory of ours is {kept} its buffer of {record['buffer_bytes'] / 1e6:.1f} MB"]
    return "\n".join(lines)


def run_forked(rank: int, world: int, port: int, setting: SyncSetting, folder: str, json_path: str) -> None:
    enter(rank, world, port)
    run_rank(setting, folder, json_path)


def run_rank(setting: SyncSetting, folder: str, json_path: str) -> None:
    """Body of one rank, in the environment of torchrun or of `bench_world`."""
    bench = build(setting, Path(folder))
    ranks = parallel.gather_lists([measure(bench, setting.repeat)])
    replica = parallel.gather_lists([num_bytes(bench.target)])[: setting.rollout_tensor]
    if dist.get_rank() == 0:
        record = summarize(setting, sum(replica), ranks)
        write_atomically(Path(json_path), (json.dumps(record, indent=2) + "\n").encode())
        print(render(record), flush=True)
        if wrong := [name for name, figures in record["variants"].items() if not figures["bit_equal"]]:
            raise SystemExit(f"not what vLLM's loader gives: {', '.join(wrong)}")
    dist.barrier()


def parse_sizes(text: str) -> Iterator[tuple[str, int]]:
    for part in text.split(","):
        name, _, size = part.partition("=")
        yield name, int(size)


def parse_arguments() -> tuple[SyncSetting, Path]:
    parser = argparse.ArgumentParser(description="Weight sync: ours against full gathers, in one run.")
    parser.add_argument("--json", type=Path, required=True, help="where all figures go")
    parser.add_argument("--world", type=int, default=4, help="ranks to fork (default: 4; torchrun's when RANK is set)")
    parser.add_argument("--train", default="tp=2,pp=2", help="the trainer's layout (default: tp=2,pp=2)")
    parser.add_argument("--rollout", default="tp=2", help="the engine's layout (default: tp=2)")
    parser.add_argument("--megabytes", type=int, default=400, help="least size of one replica (default: 400)")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each variant (default: 5)")
    default_buffer = RolloutConfig().sync_buffer_mib
    parser.add_argument(
        "--buffer-mib", type=int, default=default_buffer, help=f"rollout.sync_buffer_mib (default: {default_buffer})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    train, rollout = dict(parse_sizes(args.train)), dict(parse_sizes(args.rollout))
    if train.keys() - {"tp", "pp"} or rollout.keys() - {"tp"}:
        parser.error(f"--train {args.train} --rollout {args.rollout}: give tp=N,pp=N and tp=N")
    setting = SyncSetting(
        world=int(os.environ.get("WORLD_SIZE", args.world)),
        tensor=train.get("tp", 1),
        pipeline=train.get("pp", 1),
        rollout_tensor=rollout.get("tp", 1),
        megabytes=args.megabytes,
        repeat=args.repeat,
        device=choose_backend(args.device).device,
        buffer_bytes=args.buffer_mib << 20,
    )
    return setting, args.json


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks, as CUDA's caching allocator does.

    By default it maps each of them anew; the page faults would weigh most on the full gathers, which allocate most.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    setting, json_path = parse_arguments()
    keep_freed_memory()
    num_layers = 2 * setting.pipeline
    itemsize = choose_backend(setting.device).dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), hidden_size(setting.megabytes, num_layers, itemsize), num_layers)
        if "RANK" in os.environ:
            run_rank(setting, folder, str(json_path))
        else:
            fork_world(setting.world, run_forked, setting, folder, str(json_path))


if __name__ == "__main__":
    main()
