# SPDX-License-Identifier: Apache-2.0
"""I3 for a trained tower: its gradients, whatever the layout, are those of one autograd graph from frames to loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.mcore_to_hf import mcore_to_hf
from checkpoint_tools.verify import verify
from data.video.prefetch import FramePrefetcher
from megatron_rl.algorithms.losses import PpoClip
from megatron_rl.media.encoder import ParallelEncoder
from megatron_rl.training import checkpoint
from megatron_rl.training.batch import pack
from megatron_rl.training.microbatch import localize
from megatron_rl.training.policy import Hyperparameters, Policy, Reference
from megatron_rl.types import MediaItem, VisionPart
from model_providers.hf_checkpoint import HfCheckpoint
from tests import tiny_policy as tp
from tests.vision_parts import MadeFrames
from tests.world import run_world

TOLERANCE = 1e-5
WHOLE, ONE_BY_ONE = 400, 148  # tokens: of any group; of the longest sample
LOSS = PpoClip(kl_coef=0.1)
BOTH: frozenset[VisionPart] = frozenset({"tower", "projector"})
TOWER: frozenset[VisionPart] = frozenset({"tower"})
PROJECTOR: frozenset[VisionPart] = frozenset({"projector"})


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    trained: frozenset[VisionPart] = BOTH
    share: bool = True
    budget: int = WHOLE
    recompute: str = "none"
    freeze_language: bool = False
    hyper: Hyperparameters = tp.MEASURE

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}_pp{self.pipeline}_cp{self.context}_dp{self.data}"
        sharing = "share" if self.share else "repeat"
        return "-".join([sizes, *sorted(self.trained), sharing, str(self.budget), self.recompute])


class Parts:
    """A policy with a trained tower on this rank, and what encodes for it."""

    def __init__(self, folder: Path, case: Case):
        mesh = tp.join(case.tensor, case.pipeline, context=case.context)
        provider = tp.open_provider(folder)
        model = provider.build_language(tp.BACKEND, mesh, 1.0, case.recompute)
        provider.load_language(model, mesh)
        model.requires_grad_(not case.freeze_language)
        self.media_encoder = provider.build_encoder(tp.BACKEND, torch.device("cpu"), case.trained)
        assert self.media_encoder is not None
        policy = Policy(model, tp.BACKEND, mesh, case.hyper, self.media_encoder)
        self.trainer = tp.Trainer(provider, mesh, policy)
        self.cache = ParallelEncoder(self.media_encoder, FramePrefetcher(MadeFrames(), 0), frames_per_chunk=8)
        self.case = case
        self.groups = tp.grouped_samples(provider)
        self.videos = videos_of(self.groups)

    def update(self, step: int = 0, scored: Any = tp.off_policy) -> dict[str, tuple[float, float]]:
        """One update on all groups, as the jobs make it."""
        case, mesh = self.case, self.trainer.mesh
        self.cache.forget()
        assert self.cache.encode(self.videos) == {}
        batches = pack(self.groups, 1, case.budget, self.trainer.provider, mesh, share_prefix=case.share)[0].batches
        local, wanted = localize(batches)
        embeds = self.cache.fetch_tokens(wanted if mesh.is_first_stage else {})
        backward = partial(self.cache.backward, embeds)
        return self.trainer.policy.train(scored(local), embeds.tables, LOSS, step, backward)


def videos_of(groups: Sequence[Sequence[Any]]) -> list[MediaItem]:
    return list({v.key: v for group in groups for v in group[0].prompt.media}.values())


def _tower_gradients(policy: Policy) -> dict[str, Tensor]:
    """By Hugging Face name, of the trained parameters; the distributed optimizer's parts gathered. Collective."""
    assert policy.media_encoder is not None and policy.encoder_training is not None
    for group in policy.encoder_training.ddp.bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)
    named = policy.media_encoder.named_weights()
    assert all(p.grad is None for p in named.values()), "a gradient beside the buffer"
    return {name: p.main_grad.clone() for name, p in named.items() if p.requires_grad}


def _measure(rank: int, folder: Path, case: Case) -> Any:
    parts = Parts(folder, case)
    metrics = parts.update()
    counts = parts.cache.take_counts()
    return metrics, tp.gradients(parts.trainer), _tower_gradients(parts.trainer.policy), counts


def _one_graph(rank: int, folder: Path) -> Any:
    """The tower inside the model: one process, one graph, whole videos, every prompt in one micro-batch."""
    trainer = tp.open_trainer(folder, tp.join(), tp.MEASURE)
    media_encoder = trainer.provider.build_encoder(tp.BACKEND, torch.device("cpu"), BOTH)
    groups = tp.grouped_samples(trainer.provider)
    decoder = MadeFrames()
    embeds = {
        v.key: media_encoder._forward(decoder.decode(v.path, v.frame_indices, v.size_hw)) for v in videos_of(groups)
    }
    batches = pack(groups, 1, 10_000, trainer.provider, trainer.mesh, share_prefix=False)[0].batches
    assert len(batches) == 1
    metrics = trainer.policy.train(tp.off_policy(batches), embeds, LOSS, step=0)
    num_tokens = sum(len(s.response_ids) for group in groups for s in group)
    gradients = {name: p.grad / num_tokens for name, p in media_encoder.named_weights().items()}
    return metrics, tp.gradients(trainer), gradients


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the language model and of the vision side, by Hugging Face name."""
    [(_, pieces, vision)] = run_world(1, _one_graph, tiny_checkpoint)
    return tp.assemble(tp.open_provider(tiny_checkpoint), [pieces]), vision


def _expected(vision: Mapping[str, Tensor], trained: frozenset[VisionPart]) -> dict[str, Tensor]:
    def part(name: str) -> VisionPart:
        return "projector" if ".merger." in name else "tower"

    return {name: grad for name, grad in vision.items() if part(name) in trained}


CASES = [
    *[Case(t, p, c) for t, p, c in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 1, 2), (2, 2, 1)]],
    Case(data=2),
    Case(1, 1, 2, 2, share=False, budget=ONE_BY_ONE),
    Case(2, 1, 1, share=False, budget=ONE_BY_ONE, recompute="full"),
    *[Case(2, 1, 2, trained=part) for part in (TOWER, PROJECTOR)],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_graph(tiny_checkpoint: Path, truth: Any, case: Case) -> None:
    language, vision = truth
    ranks = run_world(case.world, _measure, tiny_checkpoint, case)
    ours = tp.assemble(tp.open_provider(tiny_checkpoint), [pieces for _, pieces, _, _ in ranks])
    errors = tp.relative_errors(ours, language)
    assert max(errors.values()) <= TOLERANCE, errors
    expected = _expected(vision, case.trained)
    for _, _, gradients, _ in ranks:
        errors = tp.relative_errors(gradients, expected)
        assert max(errors.values()) <= TOLERANCE, errors
    everything = torch.cat([g.flatten() for g in [*language.values(), *expected.values()]]).double()
    norms = {metrics["actor/grad_norm"] for metrics, *_ in ranks}
    assert max(norms)[0] == pytest.approx(float(everything.norm()), rel=TOLERANCE) and len(norms) == 1
    encoded = sum(counts.encoded_patches for *_, counts in ranks)
    assert encoded == sum(counts.backward_patches for *_, counts in ranks), "one backward pass a patch"


@pytest.mark.parametrize(
    ("sizes", "recompute"),
    [
        ((2, 1, 2), "none"),
        ((1, 2, 1), "full"),
        *(pytest.param(sizes, "full", marks=pytest.mark.full) for sizes in [(1, 1, 1), (2, 1, 2)]),
    ],
)
def test_the_projector_alone_is_trained(
    tiny_checkpoint: Path, truth: Any, sizes: tuple[int, int, int], recompute: str
) -> None:
    """The whole language model frozen, as when a new projector is fitted to it."""
    case = Case(*sizes, trained=PROJECTOR, freeze_language=True, recompute=recompute)
    expected = _expected(truth[1], PROJECTOR)
    for metrics, pieces, gradients, _ in run_world(case.world, _measure, tiny_checkpoint, case):
        errors = tp.relative_errors(gradients, expected)
        assert pieces == [] and max(errors.values()) <= TOLERANCE, errors
        norm = torch.cat([g.flatten() for g in expected.values()]).double().norm()
        assert metrics["actor/grad_norm"][0] == pytest.approx(float(norm), rel=TOLERANCE)


def test_every_tensor_of_the_tower_gets_a_gradient(truth: Any) -> None:
    assert all(g.norm() > 0 for g in truth[1].values())


# ------------------------------------------------------------------------------------------------------- whole updates


def _train_once(rank: int, folder: Path, case: Case) -> Any:
    """(tower before, after, loss of two updates, clipped norm) and the tower of the reference, seen and left again."""
    parts = Parts(folder, case)
    policy, cache = parts.trainer.policy, parts.cache
    before = {name: p.detach().clone() for name, p in parts.media_encoder.named_weights().items()}
    reference = Reference(policy)
    parts.update(0)
    after = {name: p.detach().clone() for name, p in parts.media_encoder.named_weights().items()}
    cache.forget()
    cache.encode(parts.videos)
    wanted = {v.key: ((0, v.num_tokens),) for v in parts.videos}
    now = cache.fetch_tokens(wanted)
    with reference.swapped_in():
        then = cache.refreshed(now)
    assert cache.refreshed(now) is now, "the tower is what it was before the reference came in"
    first = {key: table.detach().clone() for key, table in then.tables.items()}
    return before, after, first, {key: t.detach() for key, t in now.tables.items()}


@pytest.mark.parametrize("trained", [TOWER, PROJECTOR, pytest.param(BOTH, marks=pytest.mark.full)])
def test_an_update_changes_what_is_trained_and_the_reference_stays(
    tiny_checkpoint: Path, trained: frozenset[VisionPart]
) -> None:
    case = Case(2, 1, 1, trained=trained, hyper=replace(tp.HYPER, weight_decay=0.0))
    ranks = run_world(2, _train_once, tiny_checkpoint, case)
    for before, after, first, now in ranks:
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == _expected(before, trained).keys()
        assert all(torch.equal(after[name], ranks[0][1][name]) for name in after), "ranks hold other towers"
        assert all(not torch.equal(first[key], now[key]) for key in now)
    media_encoder = tp.open_provider(tiny_checkpoint).build_encoder(tp.BACKEND, torch.device("cpu"))
    for video in videos_of(tp.grouped_samples(tp.open_provider(tiny_checkpoint))):
        whole = media_encoder.encode(MadeFrames().decode(video.path, video.frame_indices, video.size_hw))
        torch.testing.assert_close(ranks[0][2][video.key], whole, rtol=1e-5, atol=1e-5)


def _two_updates(rank: int, folder: Path, case: Case) -> dict[str, Tensor]:
    """Two updates of one step: the second one sees the tower that the first one left."""
    parts = Parts(folder, case)
    policy, cache, mesh = parts.trainer.policy, parts.cache, parts.trainer.mesh
    cache.encode(parts.videos)
    updates = pack(parts.groups, 2, case.budget, parts.trainer.provider, mesh)
    local = [localize(update.batches) for update in updates]
    made = [cache.fetch_tokens(wanted if mesh.is_first_stage else {}) for _, wanted in local]
    for (batches, _), embeds in zip(local, made, strict=True):
        now = cache.refreshed(embeds)
        policy.train(tp.off_policy(batches), now.tables, LOSS, 0, partial(cache.backward, now))
    return {name: p.detach().clone() for name, p in parts.media_encoder.named_weights().items()}


def test_later_updates_encode_with_the_tower_as_it_is(tiny_checkpoint: Path) -> None:
    hyper = replace(tp.HYPER, lr=1e-3, eps=1e-2)  # so that noise in small gradients does not become a whole step
    [alone] = run_world(1, _two_updates, tiny_checkpoint, Case(hyper=hyper))
    for media_encoder in run_world(4, _two_updates, tiny_checkpoint, Case(2, 1, 2, hyper=hyper)):
        for name, weight in alone.items():
            torch.testing.assert_close(media_encoder[name], weight, rtol=1e-5, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------- checkpoints and the export

N = 2


def _updates(rank: int, folder: Path, root: Path, case: Case, load: int, save: int | None, stop: int) -> Any:
    """Updates load .. stop-1; (loss sums by step, tower, language model pieces, optimizer state of this rank)."""
    parts = Parts(folder, case)
    policy, mesh = parts.trainer.policy, parts.trainer.mesh
    if load:
        state = checkpoint.load(checkpoint.step_folder(root, load), policy, mesh)
        assert state == {"step": load, "version": load, "best": None}
    history = []
    for step in range(load, stop):
        history.append(parts.update(step).get("actor/pg_loss", (0.0, 0.0)))
        if step + 1 == save:
            checkpoint.save(root, save, policy, mesh, {"best": None}, hf_source=str(folder))
    media_encoder = {name: p.detach().clone() for name, p in parts.media_encoder.named_weights().items()}
    moments = [
        {key: value.clone() for key, value in part.optimizer.state[param].items()}
        for part in policy.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for param in group["params"]
    ]
    return history, media_encoder, tp.weights(parts.trainer), moments


LEARNING = replace(tp.HYPER, lr=1e-3)


def test_resume_at_the_same_layout_to_the_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    case = Case(2, 1, 1, hyper=LEARNING)
    straight = run_world(2, _updates, tiny_checkpoint, tmp_path, case, 0, N, 2 * N)
    resumed = run_world(2, _updates, tiny_checkpoint, tmp_path, case, N, None, 2 * N)
    for (history, media_encoder, _, moments), (expected_history, expected_tower, _, expected) in zip(
        resumed, straight, strict=True
    ):
        assert history == expected_history[N:]
        assert all(torch.equal(media_encoder[name], weight) for name, weight in expected_tower.items())
        for ours, theirs in zip(moments, expected, strict=True):
            assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("trained", [BOTH, pytest.param(PROJECTOR, marks=pytest.mark.full)])
def test_resume_at_another_layout(tiny_checkpoint: Path, tmp_path: Path, trained: frozenset[VisionPart]) -> None:
    before, after = Case(2, 1, 1, trained=trained, hyper=LEARNING), Case(1, 2, 2, trained=trained, hyper=LEARNING)
    straight = run_world(2, _updates, tiny_checkpoint, tmp_path, before, 0, N, 2 * N)
    resumed = run_world(4, _updates, tiny_checkpoint, tmp_path, after, N, None, 2 * N)
    before_it, after_it = (zip(*(tops for tops, *_ in ranks), strict=True) for ranks in (straight, resumed))
    sums = [sum(top for top, _ in step) for step in before_it]
    assert [sum(top for top, _ in step) for step in after_it] == pytest.approx(sums[N:], rel=1e-4)
    moved = {name for name, w in straight[0][1].items() if not torch.equal(w, resumed[0][1][name])}
    for name in moved:
        torch.testing.assert_close(resumed[0][1][name], straight[0][1][name], rtol=1e-3, atol=1e-4, msg=name)


def _load_mismatch(rank: int, folder: Path, root: Path, trained: frozenset[VisionPart]) -> str:
    parts = Parts(folder, Case(trained=trained))
    with pytest.raises(ValueError, match=r"model\.freeze_vision: the checkpoint was made with") as error:
        checkpoint.load(checkpoint.step_folder(root, N), parts.trainer.policy, parts.trainer.mesh)
    return str(error.value)


def _start_from(rank: int, folder: Path, root: Path, again: Path) -> Any:
    """A run with a frozen tower that starts from the weights of one that trained it, and its checkpoint."""
    parts = Parts(folder, Case(trained=frozenset()))
    checkpoint.load_weights(root, parts.trainer.policy)
    checkpoint.load_encoder(root, parts.media_encoder)
    checkpoint.save(again, 1, parts.trainer.policy, parts.trainer.mesh, {"best": None}, hf_source=str(folder))
    return {name: p.detach().clone() for name, p in parts.media_encoder.named_weights().items()}


def _embed(folder: Path, frames: Tensor) -> Tensor:
    """transformers' own model from a folder, on our patches."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    patches, grid = tp.open_provider(folder).specs.pictures.patchify(frames)
    with torch.inference_mode():
        return model.model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output.clone()


def test_export_other_starts_and_what_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One checkpoint with a trained tower: exported, started from with a frozen one, and not resumed otherwise."""
    root, again, out = tmp_path / "trained", tmp_path / "frozen", tmp_path / "hf"
    case = Case(2, 1, 1, trained=PROJECTOR, hyper=LEARNING)
    trained = run_world(2, _updates, tiny_checkpoint, root, case, 0, N, N)[0][1]
    [started] = run_world(1, _start_from, tiny_checkpoint, root, again)
    assert all(torch.equal(started[name], weight) for name, weight in trained.items())
    frames = MadeFrames().decode("clip", range(4), (56, 56))
    for folder in (checkpoint.step_folder(root, N), checkpoint.step_folder(again, 1)):
        mcore_to_hf(folder, out, force=True)
        exported = HfCheckpoint(out)
        assert all(torch.equal(exported.tensor(name), weight) for name, weight in trained.items())
        assert verify(out, folder).as_dict()["same"]
    original = HfCheckpoint(tiny_checkpoint)
    changed = {name for name in trained if not torch.equal(trained[name], original.tensor(name))}
    assert changed == {name for name in trained if ".merger." in name}
    [(now, before)] = run_world(1, lambda _: (_embed(out, frames), _embed(tiny_checkpoint, frames)))
    assert not torch.allclose(now, before, atol=1e-3)
    for other in (BOTH, frozenset[VisionPart]()):
        [message] = run_world(1, _load_mismatch, tiny_checkpoint, root, other)
        assert "new run_dir with model.weights_from" in message
