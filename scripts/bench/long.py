# SPDX-License-Identifier: Apache-2.0
"""Long sequences, side by side in one run: `scripts/bench/long.py --json PATH`.

prefix    one update on a group of N responses: the prompt shared, against the prompt repeated for each response
context   one update on one long prompt: on one rank, and spread over context parallel ranks in each of the three ways

The model is tiny and real (Megatron-core, DDP, distributed optimizer). Variants take turns; times are ratios of
medians. FLOPs are those of the formula below; memory is the largest sum of live tensor storages within the update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, also under PYTHONSAFEPATH

from megatron_rl.runtime.quiet import quiet_libraries

quiet_libraries()

import torch
import torch.distributed as dist

from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import choose_backend
from megatron_rl.runtime.files import write_atomically
from megatron_rl.runtime.grid import Grid
from megatron_rl.training.batch import ScoredBatch, pack
from megatron_rl.training.microbatch import MicroBatch
from megatron_rl.training.policy import Hyperparameters, Policy
from megatron_rl.types import Prompt, Row, TrainSample
from model_providers.provider import open_provider
from model_providers.shape import TransformerShape
from scripts.bench.baselines import LiveBytes, ReceivedBytes
from scripts.bench.world import enter, fork_world
from scripts.make_tiny_checkpoint import write_checkpoint

NO_LEARNING = Hyperparameters(lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, max_grad_norm=1e9)
SHARED, REPEATED = "shared", "repeated"
GOAL_OF_FLOPS = 0.85  # of the FLOP ratio that the time ratio should reach
LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class LongSetting:
    prompt: int
    response: int
    num_samples: int
    long_prompt: int
    ranks: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one variant, over all ranks: seconds of each turn, the loss, and counts of one update."""

    seconds: list[float]
    loss: float
    peak_bytes: int
    received_bytes: int


def group(prompt: int, response: int, num_samples: int) -> list[TrainSample]:
    """One prompt of random text tokens with its responses."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())

    question = Prompt(0, Row("made:1", "", ""), tokens(prompt), ())
    return [TrainSample(question, tokens(response), (0.0,) * response) for _ in range(num_samples)]


def train_flops(shape: TransformerShape, num_tokens: int, pairs: int, num_targets: int, asked: int) -> float:
    """FLOPs of forward and backward. Linear layers: 2 a weight and token, thrice (forward, both gradients). Attention:
    4 * heads * head_dim for each pair of query and key, 3.5 times (flash recomputes the scores). Logits: 2 * H * V a
    target, four times (their forward is done again). The last layer: queries, output projection and feed-forward of
    the `num_targets` tokens that predict, and the pairs `asked` by them."""
    heads = shape.num_heads * shape.head_dim
    projection = shape.hidden_size * (heads + 2 * shape.num_groups * shape.head_dim)
    rest = shape.hidden_size * (heads + 3 * shape.ffn_hidden_size)
    layer = 6 * (projection + rest) * num_tokens + 14 * heads * pairs
    last = 6 * (projection * num_tokens + rest * num_targets) + 14 * heads * asked
    return (shape.num_layers - 1) * layer + last + 8 * shape.hidden_size * shape.vocab_size * num_targets


def flops_of(shape: TransformerShape, setting: LongSetting, share: bool) -> float:
    prompt, response, count = setting.prompt, setting.response, setting.num_samples
    of_prompt, of_responses = prompt**2 // 2, count * (prompt * response + response**2 // 2)
    prompts = 1 if share else count
    num_tokens = prompts * prompt + count * response
    return train_flops(shape, num_tokens, prompts * of_prompt + of_responses, count * response, of_responses)


# ------------------------------------------------------------------------------------------------------- on each rank


class Trainer:
    """A policy over all ranks of this world, as context parallel ranks."""

    def __init__(self, folder: Path, comm: str):
        backend = choose_backend("cpu", "float32")
        world = dist.get_world_size()
        self.mesh = parallel.initialize(backend, Grid(world, context=world), Grid(world), comm)
        self.provider = open_provider(folder)
        model = self.provider.build_language(backend, self.mesh)
        self.provider.load_language(model, self.mesh)
        self.policy = Policy(model, backend, self.mesh, NO_LEARNING)

    def pack(self, samples: Sequence[TrainSample], max_tokens: int, share: bool) -> list[MicroBatch]:
        batches = pack([samples], 1, max_tokens, self.provider, self.mesh, share_prefix=share)[0].batches
        return batches

    def update(self, batches: Sequence[MicroBatch]) -> float:
        """The mean negative log-likelihood."""
        scored = [ScoredBatch(batch) for batch in batches]
        metrics = self.policy.train(scored, {}, NllLoss(), step=0)
        sums = torch.tensor(metrics["sft/nll"], dtype=torch.float64)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])


def measured(update: Callable[[], float]) -> tuple[float, int, int]:
    """(loss, largest peak of live bytes, bytes received by all ranks) of one update that is not timed."""
    with ReceivedBytes() as received, LiveBytes() as memory:
        loss = update()
    peak, total = int(parallel.reduce_max(memory.peak)), sum(parallel.gather_lists([received.total]))
    return loss, peak, total


def timed(update: Callable[[], float]) -> float:
    """Until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    update()
    dist.barrier()
    return time.perf_counter() - start


def turns(updates: dict[str, Callable[[], float]], repeat: int) -> dict[str, Figures]:
    """Every update measured once, then all of them timed in turn."""
    counts = {name: measured(update) for name, update in updates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(repeat):
        for name, update in updates.items():
            seconds[name].append(timed(update))
    return {name: Figures(seconds[name], *counts[name]) for name in updates}


def once(update: Callable[[], float]) -> Figures:
    """Measured and timed together: one update takes minutes, beside which the counting is nothing."""
    dist.barrier()
    start = time.perf_counter()
    counts = measured(update)
    return Figures([time.perf_counter() - start], *counts)


def prefix_rank(setting: LongSetting, folder: Path) -> dict[str, Figures]:
    trainer = Trainer(folder, "all_gather")
    samples = group(setting.prompt, setting.response, setting.num_samples)
    longest = setting.num_samples * (setting.prompt + setting.response)
    packed = {name: trainer.pack(samples, longest, name == SHARED) for name in (SHARED, REPEATED)}
    return turns({name: partial(trainer.update, batches) for name, batches in packed.items()}, setting.repeat)


def context_rank(setting: LongSetting, folder: Path, comm: str) -> dict[str, Figures]:
    trainer = Trainer(folder, comm)
    batches = trainer.pack(group(setting.long_prompt, 64, 1), 2 * setting.long_prompt, share=True)
    return {comm: once(partial(trainer.update, batches))}


def run_rank(rank: int, world: int, port: int, part: str, setting: LongSetting, folder: str, out: str) -> None:
    enter(rank, world, port)
    dist.init_process_group("gloo")
    figures = prefix_rank(setting, Path(folder)) if part == "prefix" else context_rank(setting, Path(folder), part)
    if rank == 0:
        Path(out).write_text(json.dumps({name: asdict(f) for name, f in figures.items()}))
    dist.barrier()


def run_world(world: int, part: str, setting: LongSetting, folder: Path) -> dict[str, Any]:
    """{variant: its figures}, as the first rank of a forked world wrote them."""
    out = folder / f"{part}_{world}.json"
    fork_world(world, run_rank, part, setting, str(folder / "model"), str(out))
    return json.loads(out.read_text())


# ------------------------------------------------------------------------------------------------------------- report


def prefix_record(figures: dict[str, Any], flops_ratio: float) -> dict[str, Any]:
    shared, repeated = figures[SHARED], figures[REPEATED]
    time_ratio = statistics.median(repeated["seconds"]) / statistics.median(shared["seconds"])
    return {
        "time_ratio": time_ratio,
        "flops_ratio": flops_ratio,
        "time_over_flops": time_ratio / flops_ratio,
        "reaches_goal": time_ratio >= GOAL_OF_FLOPS * flops_ratio,
        "memory_ratio": repeated["peak_bytes"] / shared["peak_bytes"],
        "loss_difference": abs(repeated["loss"] - shared["loss"]),
        "variants": figures,
    }


def context_record(whole: dict[str, Any], spread: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "whole": whole,
        "variants": {
            comm: {
                **figures,
                "time_ratio": figures["seconds"][0] / whole["seconds"][0],
                "memory_ratio": figures["peak_bytes"] / whole["peak_bytes"],
                "loss_difference": abs(figures["loss"] - whole["loss"]),
            }
            for comm, figures in spread.items()
        },
    }


def render(setting: LongSetting, record: dict[str, Any]) -> str:
    prefix, context = record["prefix"], record["context"]
    lines = [
        f"update, P={setting.prompt} R={setting.response} N={setting.num_samples}: repeated / shared prompt",
        f"  time {prefix['time_ratio']:.2f}, FLOPs {prefix['flops_ratio']:.2f} (goal: {GOAL_OF_FLOPS} of them), "
        f"memory {prefix['memory_ratio']:.2f}, loss differs by {prefix['loss_difference']:.1e}",
        f"update, one prompt of {setting.long_prompt} tokens: {setting.ranks} context parallel ranks / one rank",
    ]
    for comm, f in context["variants"].items():
        lines.append(
            f"  {comm:<11} time {f['time_ratio']:.2f}, peak memory of a rank {f['memory_ratio']:.2f}, "
            f"received {f['received_bytes'] / 1e6:.0f} MB, loss differs by {f['loss_difference']:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Shared prefixes and context parallelism, in one run.")
    parser.add_argument("--json", type=Path, required=True, help="where all figures go")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the shared prompt (default: 8192)")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response (default: 128)")
    parser.add_argument("--num-samples", type=int, default=8, help="responses to the prompt (default: 8)")
    parser.add_argument("--long-prompt", type=int, default=65_536, help="tokens of the long prompt (default: 65536)")
    parser.add_argument("--ranks", type=int, default=4, help="context parallel ranks (default: 4)")
    parser.add_argument("--comm", default="all_gather,p2p,a2a", help="ways to measure (default: all three)")
    parser.add_argument("--repeat", type=int, default=3, help="timed turns of `prefix` (default: 3)")
    args = parser.parse_args()
    setting = LongSetting(args.prompt, args.response, args.num_samples, args.long_prompt, args.ranks, args.repeat)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "model", seed=0, max_positions=2 * max(args.prompt, args.long_prompt))
        shape = open_provider(folder / "model").shape
        flops_ratio = flops_of(shape, setting, share=False) / flops_of(shape, setting, share=True)
        prefix = prefix_record(run_world(1, "prefix", setting, folder), flops_ratio)
        whole = run_world(1, "all_gather", setting, folder)["all_gather"]
        spread = {comm: run_world(args.ranks, comm, setting, folder)[comm] for comm in args.comm.split(",")}
    record = {"setting": asdict(setting), "prefix": prefix, "context": context_record(whole, spread)}
    write_atomically(args.json, (json.dumps(record, indent=2) + "\n").encode())
    print(render(setting, record), flush=True)
    differences = [prefix, *record["context"]["variants"].values()]
    if max(d["loss_difference"] for d in differences) > LOSS_TOLERANCE:
        raise SystemExit(f"losses differ by more than {LOSS_TOLERANCE}")


if __name__ == "__main__":
    main()
