# SPDX-License-Identifier: Apache-2.0
"""Samples, policies and whole gradients for tests of the trainer.

Nothing here knows the layout of a parameter: full tensors are put together through the weight table.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.protocols import ModelProvider
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import choose_backend
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.training.batch import ScoredBatch, pack
from megatron_rl.training.microbatch import MicroBatch
from megatron_rl.training.policy import Hyperparameters, Policy
from megatron_rl.types import MediaItem, Prompt, Row, TrainSample
from model_providers.provider import open_provider

BACKEND = choose_backend("cpu", "float32")
NO_CLIPPING = 1e9
HYPER = Hyperparameters(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, warmup_steps=0, max_grad_norm=1.0)
MEASURE = Hyperparameters(
    lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, max_grad_norm=NO_CLIPPING
)
MERGE, HIDDEN = 2, 128

WeightPart = tuple[str, slice, slice, Tensor]  # Hugging Face name, rows, columns, values


def video(key: str, grid_thw: tuple[int, int, int], seconds_per_grid: float = 1.0) -> MediaItem:
    """Two frames of 14-pixel patches per step of the grid; no file behind it."""
    t, h, w = grid_thw
    times = tuple(i * seconds_per_grid / 2 for i in range(2 * t))
    num_tokens = t * h * w // MERGE**2
    frames, size = tuple(range(2 * t)), (14 * h, 14 * w)
    per_unit = num_tokens // t
    return MediaItem(key, f"{key}.mp4", frames, times, size, grid_thw, seconds_per_grid, num_tokens, 2 * t, 2, per_unit)


def sample(
    provider: ModelProvider, seed: int, num_text: int, num_response: int, videos: Sequence[MediaItem] = ()
) -> TrainSample:
    """`num_text` random tokens before the first video, and two between videos and after the last."""
    rng = random.Random(seed)
    tokens = [rng.randrange(256) for _ in range(num_text)]
    spans = []
    for clip in videos:
        spans.append(((len(tokens), len(tokens) + clip.num_tokens),))
        tokens += [provider.specs.placeholder_ids["video"]] * clip.num_tokens + [rng.randrange(256) for _ in range(2)]
    return TrainSample(
        prompt=Prompt(seed, Row(f"made:{seed}", "", ""), tuple(tokens), tuple(videos), tuple(spans)),
        response_ids=tuple(rng.randrange(256) for _ in range(num_response)),
        rollout_logprobs=tuple(rng.uniform(-6.5, -5.0) for _ in range(num_response)),
        weight=rng.uniform(0.5, 1.5),
    )


def mixed_samples(provider: ModelProvider) -> list[TrainSample]:
    """Text only, one video, two videos of different grids; all of different lengths."""
    near, far = video("near", (2, 4, 4)), video("far", (5, 4, 6), seconds_per_grid=3.3)
    return [
        sample(provider, 1, num_text=9, num_response=4),
        sample(provider, 2, num_text=5, num_response=7, videos=[near]),
        sample(provider, 3, num_text=3, num_response=2, videos=[far, near]),
        sample(provider, 4, num_text=17, num_response=5),
        sample(provider, 5, num_text=1, num_response=1, videos=[far]),
    ]


def grouped_samples(provider: ModelProvider) -> list[list[TrainSample]]:
    """Groups of one prompt each: one long video with five responses, text with three, two videos with two, and a single
    sample; responses of different lengths."""
    near, far, long = video("near", (2, 4, 4)), video("far", (5, 4, 6), seconds_per_grid=3.3), video("long", (16, 4, 8))
    groups = []
    for number, (num_text, videos, lengths) in enumerate(
        [(9, [long], (4, 7, 7, 1, 5)), (21, [], (6, 6, 3)), (3, [far, near], (8, 2)), (17, [], (5,))]
    ):
        first = sample(provider, 10 * number, num_text, lengths[0], videos)
        others = [sample(provider, 10 * number + i, 1, n) for i, n in enumerate(lengths[1:], 1)]
        groups.append([first, *(replace(other, prompt=first.prompt) for other in others)])
    return groups


def random_embeds(samples: Iterable[TrainSample]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    videos = {v.key: v for s in samples for v in s.prompt.media}
    return {key: torch.randn(v.num_tokens, HIDDEN, generator=generator) for key, v in sorted(videos.items())}


@dataclass(frozen=True)
class Trainer:
    """A policy on this rank and what it takes to feed it."""

    provider: ModelProvider
    mesh: ParallelMesh
    policy: Policy

    def pack(self, samples: Sequence[TrainSample], max_tokens: int = 4096) -> list[MicroBatch]:
        return pack([[s] for s in samples], 1, max_tokens, self.provider, self.mesh)[0].batches


def join(
    tensor: int = 1, pipeline: int = 1, expert: int = 1, virtual: int = 1, context: int = 1, comm: str = "all_gather"
) -> ParallelMesh:
    world = parallel.world_size()
    trainer = Grid(world, tensor=tensor, pipeline=pipeline, context=context, expert=expert, virtual=virtual)
    return parallel.initialize(BACKEND, trainer, Grid(world), comm)


def open_trainer(
    folder: Path,
    mesh: ParallelMesh,
    hyper: Hyperparameters = HYPER,
    temperature: float = 1.0,
    recompute: str = "none",
    frozen: Sequence[str] = (),
) -> Trainer:
    """`frozen` names parameters, as the weight table does, that are not trained."""
    provider = open_provider(folder)
    model = provider.build_language(BACKEND, mesh, temperature, recompute)
    provider.load_language(model, mesh)
    for name in frozen:
        if name in model.named_weights():
            model.named_weights()[name].requires_grad_(False)
    return Trainer(provider, mesh, Policy(model, BACKEND, mesh, hyper))


def unscored(batches: Sequence[MicroBatch]) -> list[ScoredBatch]:
    return [ScoredBatch(batch) for batch in batches]


def off_policy(batches: Sequence[MicroBatch]) -> list[ScoredBatch]:
    """Old and reference log-probabilities and advantages that depend on nothing but the sample and the token."""
    return [
        ScoredBatch(b, b.rollout_logprobs, b.rollout_logprobs - 0.3, advantages_of(b.rollout_logprobs)) for b in batches
    ]


def advantages_of(rollout_logprobs: Tensor) -> Tensor:
    """From -0.75 to 0.75 for the log-probabilities that `sample` makes up."""
    return rollout_logprobs + 5.75


def snapshot(policy: Policy) -> dict[str, Tensor]:
    """Copies of this rank's weights and of its part of the optimizer state."""
    tensors = {name: p.detach().clone() for name, p in policy.language_model.named_weights().items()}
    for group in policy.optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            state = policy.optimizer.optimizer.state[param]
            tensors |= {f"{group['wd_mult']}.{index}.{key}": value.clone() for key, value in state.items()}
    return tensors


def weights(trainer: Trainer) -> list[WeightPart]:
    """This rank's parameters, as pieces of Hugging Face tensors."""
    named = trainer.policy.language_model.named_weights()
    return _parts(trainer, {name: param.detach() for name, param in named.items()})


def gradients(trainer: Trainer) -> list[WeightPart]:
    """This rank's gradients after Policy.train, as pieces of Hugging Face tensors. Collective.

    The distributed optimizer leaves each data parallel rank only its own part summed; the parts are gathered first.
    """
    for group in [g for c in trainer.policy.chunks for g in (*c.bucket_groups, *c.expert_parallel_bucket_groups)]:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)
    named = trainer.policy.language_model.named_weights()
    return _parts(trainer, {name: p.main_grad for name, p in named.items() if p.requires_grad})


def _parts(trainer: Trainer, tensors: Mapping[str, Tensor]) -> list[WeightPart]:
    pieces, mesh = [], trainer.mesh
    for name, tensor in tensors.items():
        entry = trainer.provider.weight_map[name]
        local = tensor if tensor.ndim == 2 else tensor[:, None]
        for block in entry.layout.trainer(entry.hf, *mesh.slot(entry.layout.is_expert)).blocks:
            pieces.append((block.hf, *block.hf_slices, local[block.local_slices].clone()))
    return pieces


def assemble(provider: ModelProvider, ranks: Iterable[Iterable[WeightPart]], atol: float = 1e-6) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name. Every element must be there; where ranks hold copies, they must agree."""
    full: dict[str, Tensor] = {}
    for name, rows, cols, values in (part for rank in ranks for part in rank):
        hf = provider.weight_map.hf_tensors()[name]
        tensor = full.setdefault(name, torch.full((hf.rows, hf.cols), float("nan")))
        present = tensor[rows, cols]
        known = ~present.isnan()
        torch.testing.assert_close(present[known], values[known], rtol=1e-5, atol=atol, msg=f"{name}: copies differ")
        present.copy_(values)
    gaps = [name for name, tensor in full.items() if tensor.isnan().any()]
    assert not gaps, f"no rank holds all of {gaps}"
    return full


def relative_errors(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """norm(g - g0) / norm(g0) of each tensor."""
    assert ours.keys() == truth.keys()
    return {name: float((ours[name] - g).norm() / g.norm()) for name, g in truth.items()}
