# SPDX-License-Identifier: Apache-2.0
"""DeepStack at every layout: log-probabilities and gradients, those of the media features included, are those of
transformers' language model with hooks that add the features after the first layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.runtime.grid import Grid
from megatron_rl.training.batch import pack
from megatron_rl.training.policy import Policy
from megatron_rl.types import TrainSample
from model_providers.hf_files import canonical_hf_name
from model_providers.transformer import TokenPolicy, build_language_model
from tests import tiny_policy as tp
from tests.world import run_world

NUM_LAYERS, LEVELS = 6, 2
SAME_LOGPROBS, SAME_GRADIENTS = 2e-5, 1e-5
WHOLE, PARTS = 400, 200  # tokens of a micro-batch: enough for any group, or for most


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual: int = 1
    recompute: str = "none"
    comm: str = "all_gather"
    levels: int = LEVELS
    budget: int = WHOLE

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}_pp{self.pipeline}x{self.virtual}_cp{self.context}"
        return f"{sizes}-{self.recompute}-{self.comm}-{self.levels}-{self.budget}"


CASES = [
    *[Case(*sizes) for sizes in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]],
    *[Case(*sizes, recompute="full") for sizes in [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)]],
    *[Case(*sizes, recompute="selective") for sizes in [(1, 1, 1), (2, 1, 2)]],
    Case(1, 1, 2, comm="a2a", recompute="full"),
    Case(1, 3, 1, virtual=2, levels=1, recompute="full", budget=PARTS),
]


@pytest.fixture(scope="module")
def deep(heavy_imports: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL of six layers."""
    from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("deep"), make_tokenizer()
    config = make_config(tokenizer)
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = NUM_LAYERS, text.layer_types[:1] * NUM_LAYERS
    make_model(config, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _embeds(samples: list[TrainSample], levels: int) -> dict[str, Tensor]:
    """[tokens, H * (1 + levels)] of every video, to be differentiated."""
    generator = torch.Generator().manual_seed(7)
    videos = {v.key: v.num_tokens for s in samples for v in s.prompt.media}
    width = tp.HIDDEN * (1 + levels)
    return {key: torch.randn(n, width, generator=generator).requires_grad_() for key, n in sorted(videos.items())}


def _flat(provider: Any) -> list[TrainSample]:
    return [s for group in tp.grouped_samples(provider) for s in group]


def _measure(rank: int, folder: Path, case: Case) -> Any:
    """(parts of the log-probabilities by sample, gradient pieces, gradients of the features) of this rank."""
    mesh = tp.join(case.tensor, case.pipeline, virtual=case.virtual, context=case.context, comm=case.comm)
    provider = tp.open_provider(folder)
    shape, tokens = replace(provider.shape, deepstack_levels=case.levels), TokenPolicy(1.0, provider.forbidden_tokens)
    model = build_language_model(shape, tp.BACKEND, mesh, tokens, case.recompute)
    provider.load_language(model, mesh)
    trainer = tp.Trainer(provider, mesh, Policy(model, tp.BACKEND, mesh, tp.MEASURE))
    batches = pack(tp.grouped_samples(provider), 1, case.budget, provider, mesh)[0].batches
    samples = _flat(provider)
    embeds = _embeds(samples, case.levels)
    lines: dict[int, Tensor] = {}
    for batch, values in zip(batches, trainer.policy.logprobs(batches, embeds), strict=True):
        if values is not None:
            lengths = [len(samples[i].response_ids) for i in batch.samples]
            line = torch.zeros(sum(lengths)).index_copy(0, batch.response_index, values)
            for index, part in zip(batch.samples, line.split(lengths), strict=True):
                lines[index] = lines.get(index, 0) + part
    trainer.policy.train(tp.unscored(batches), embeds, NllLoss(), step=0)
    features = {key: e.grad for key, e in embeds.items() if e.grad is not None}
    return lines if mesh.here.tp == 0 else {}, tp.gradients(trainer), features


def _add_after_layers(model: Any, at_media: Tensor, levels: Tensor) -> list[Any]:
    """Hooks that add `levels` [n, L, H] to the rows `at_media` of what the first L layers return."""

    def adding(level: int) -> Any:
        def hook(module: Any, args: Any, hidden: Tensor) -> Tensor:
            return hidden.index_add(1, at_media, levels[None, :, level])

        return hook

    layers = model.model.language_model.layers[: levels.shape[1]]
    return [layer.register_forward_hook(adding(level)) for level, layer in enumerate(layers)]


def _truth(folder: Path, levels: int) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(log-probabilities by sample, gradients by name, gradients of the features), one sample at a time."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    provider = tp.open_provider(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    samples = _flat(provider)
    embeds, logprobs = _embeds(samples, levels), []
    num_tokens = sum(len(s.response_ids) for s in samples)
    for sample in samples:
        ids = torch.tensor([*sample.prompt.token_ids, *sample.response_ids])
        hidden, at_media = (
            model.get_input_embeddings()(ids),
            (ids == provider.specs.placeholder_ids["video"]).nonzero().squeeze(1),
        )
        hooks: list[Any] = []
        if sample.prompt.media:
            rows = torch.cat([embeds[v.key] for v in sample.prompt.media]).unflatten(1, (-1, tp.HIDDEN))
            hidden = hidden.index_copy(0, at_media, rows[:, 0])
            hooks = _add_after_layers(model, at_media, rows[:, 1:])
        positions = provider.position_ids(len(ids), sample.prompt.media, sample.prompt.spans)[:, None]
        output = model.model.language_model(inputs_embeds=hidden[None], position_ids=positions).last_hidden_state[0]
        for hook in hooks:
            hook.remove()
        logits = model.lm_head(output[len(sample.prompt.token_ids) - 1 : -1])
        logits = logits.index_add(1, torch.tensor(provider.forbidden_tokens), torch.full((len(logits), 2), -100.0))
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        (-chosen.sum() * sample.weight / num_tokens).backward()
        logprobs.append(chosen.detach())
    grads = {canonical_hf_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    tables = {key: e.grad * num_tokens for key, e in embeds.items() if e.grad is not None}  # the trainer divides later
    return logprobs, {name: g if g.ndim == 2 else g[:, None] for name, g in grads.items()}, tables


@pytest.fixture(scope="module")
def truths(deep: Path) -> dict[int, Any]:
    return {levels: _truth(deep, levels) for levels in (1, LEVELS)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_transformers_with_hooks(deep: Path, truths: dict[int, Any], case: Case) -> None:
    logprobs, gradients, features = truths[case.levels]
    ranks = run_world(case.world, _measure, deep, case)
    for index, expected in enumerate(logprobs):
        found = sum(lines[index] for lines, _, _ in ranks if index in lines)
        torch.testing.assert_close(found, expected, rtol=0, atol=SAME_LOGPROBS)
    errors = tp.relative_errors(tp.assemble(tp.open_provider(deep), [pieces for _, pieces, _ in ranks]), gradients)
    assert max(errors.values()) <= SAME_GRADIENTS, errors
    for key, expected in features.items():
        found = sum(grads[key] for _, _, grads in ranks if key in grads)
        for part, truth in zip(found.split(tp.HIDDEN, 1), expected.split(tp.HIDDEN, 1), strict=True):
            assert float((part - truth).norm() / truth.norm()) <= SAME_GRADIENTS, key


def _build_too_short(rank: int, folder: Path) -> str:
    mesh, provider = tp.join(1, 3), tp.open_provider(folder)
    with pytest.raises(ValueError) as caught:
        build_language_model(replace(provider.shape, deepstack_levels=3), tp.BACKEND, mesh, TokenPolicy())
    return str(caught.value)


def test_a_first_stage_that_is_too_short_is_refused(deep: Path) -> None:
    why = "parallel.pipeline=3: the first stage holds 2 of the 3 layers that take media features; use fewer stages"
    assert all(why in message for message in run_world(3, _build_too_short, deep))
    shape = tp.open_provider(deep).shape
    two_levels = replace(shape, deepstack_levels=2)
    assert Grid(3, pipeline=3).deepstack_problems(two_levels) == []
    [problem] = Grid(3, pipeline=3, virtual=2).problems(two_levels)
    assert "holds 1 of the 2 layers" in problem.why
    assert Grid(6, pipeline=6).deepstack_problems(shape) == []
    with pytest.raises(ValueError, match="model.hf: 6 levels of media features for 6 layers"):
        replace(shape, deepstack_levels=6)
