# SPDX-License-Identifier: Apache-2.0
"""I8: our language model, at every layout, against transformers' Qwen2.5-VL, from video frames to gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.losses import NllLoss
from model_providers.hf_files import canonical_hf_name
from tests import tiny_policy as tp
from tests.world import run_world

TOLERANCE = 1e-4
TEMPERATURES = (1.0, 0.7)
PLACEHOLDER_BIAS = -100.0


def _frames(samples: Sequence[Any]) -> dict[str, Tensor]:
    """Random uint8 frames of every video."""
    generator = torch.Generator().manual_seed(3)
    videos = {v.key: v for s in samples for v in s.prompt.media}
    return {
        key: torch.randint(0, 256, (len(v.frame_indices), 3, *v.size_hw), generator=generator, dtype=torch.uint8)
        for key, v in sorted(videos.items())
    }


def _open_reference(folder: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def _reference_logprobs(model: Any, provider: Any, samples: Sequence[Any], temperature: float) -> list[Tensor]:
    """transformers from uint8 frames on: its own processor, encoder and merge; only the position ids are ours."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(patch_size=14, temporal_patch_size=2, merge_size=2)
    frames = _frames(samples)
    logprobs = []
    for sample in samples:
        videos = sample.prompt.media
        media = {}
        if videos:
            made = [
                processor([frames[v.key]], do_resize=False, do_sample_frames=False, return_tensors="pt") for v in videos
            ]
            media = {name: torch.cat([m[name] for m in made]) for name in ("pixel_values_videos", "video_grid_thw")}
            assert media["video_grid_thw"].tolist() == [list(v.grid_thw) for v in videos]
        ids = [*sample.prompt.token_ids, *sample.response_ids]
        positions = provider.position_ids(len(ids), videos, sample.prompt.spans)
        logits = model(input_ids=torch.tensor([ids]), position_ids=positions[:, None], **media).logits[0]
        logits[:, list(provider.forbidden_tokens)] += PLACEHOLDER_BIAS
        first = len(sample.prompt.token_ids) - 1
        rows = (logits[first:-1] / temperature).log_softmax(-1)
        logprobs.append(rows.gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0])
    return logprobs


def _our_logprobs(folder: Path, tensor: int, pipeline: int, embeds: dict[str, Tensor]) -> Any:
    """{(temperature, token budget): log-probabilities by sample} on the last stage."""
    mesh = tp.join(tensor, pipeline)
    results = {}
    for temperature in TEMPERATURES:
        trainer = tp.open_trainer(folder, mesh, tp.MEASURE, temperature=temperature)
        samples = tp.mixed_samples(trainer.provider)
        for budget in (4096, max(s.num_tokens for s in samples)):
            batches = trainer.pack(samples, budget)
            by_sample: dict[int, Tensor] = {}
            for batch, values in zip(batches, trainer.policy.logprobs(batches, embeds), strict=True):
                assert (values is not None) == mesh.is_last_stage
                if values is not None:
                    lengths = [len(samples[i].response_ids) for i in batch.samples]
                    by_sample |= dict(zip(batch.samples, values.split(lengths), strict=True))
            results[temperature, budget] = by_sample
    return results


def _check_parity(folder: Path, tensor: int, pipeline: int) -> None:
    provider = tp.open_provider(folder)
    samples = tp.mixed_samples(provider)
    encoder = provider.build_encoder(tp.BACKEND, torch.device("cpu"))
    embeds = {key: encoder.encode(frames).detach() for key, frames in _frames(samples).items()}
    model = _open_reference(folder)
    with torch.no_grad():
        expected = {t: _reference_logprobs(model, provider, samples, t) for t in TEMPERATURES}
    ranks = run_world(tensor * pipeline, lambda _: _our_logprobs(folder, tensor, pipeline, embeds))
    for results in ranks[-tensor:]:  # the last stage
        for (temperature, budget), by_sample in results.items():
            assert sorted(by_sample) == list(range(len(samples)))
            for index, values in by_sample.items():
                gap = float((values - expected[temperature][index]).abs().max())
                assert gap <= TOLERANCE, f"sample {index}, temperature {temperature}, {budget} tokens: {gap}"


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_logprobs_are_those_of_transformers(tiny_checkpoint: Path, tensor: int, pipeline: int) -> None:
    _check_parity(tiny_checkpoint, tensor, pipeline)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_tied_embeddings(tied_checkpoint: Path, tensor: int, pipeline: int) -> None:
    _check_parity(tied_checkpoint, tensor, pipeline)


def _our_gradients(folder: Path) -> Any:
    trainer = tp.open_trainer(folder, tp.join(), tp.MEASURE)
    samples = tp.mixed_samples(trainer.provider)
    trainer.policy.train(tp.unscored(trainer.pack(samples)), tp.random_embeds(samples), NllLoss(), step=0)
    return tp.gradients(trainer)


def _reference_gradients(folder: Path, provider: Any) -> dict[str, Tensor]:
    """Autograd through transformers' language model, one sample at a time; the loss is the mean over all tokens."""
    model = _open_reference(folder)
    samples = tp.mixed_samples(provider)
    embeds = tp.random_embeds(samples)
    num_tokens = sum(len(s.response_ids) for s in samples)
    for sample in samples:
        ids = torch.tensor([*sample.prompt.token_ids, *sample.response_ids])
        hidden = model.get_input_embeddings()(ids)
        if sample.prompt.media:
            at_video = (ids == provider.specs.placeholder_ids["video"])[:, None].expand_as(hidden)
            hidden = hidden.masked_scatter(at_video, torch.cat([embeds[v.key] for v in sample.prompt.media]))
        positions = provider.position_ids(len(ids), sample.prompt.media, sample.prompt.spans)[:, None]
        output = model.model.language_model(inputs_embeds=hidden[None], position_ids=positions).last_hidden_state[0]
        logits = model.lm_head(output[len(sample.prompt.token_ids) - 1 : -1])
        bias = torch.zeros(logits.shape[1]).index_fill(0, torch.tensor(provider.forbidden_tokens), PLACEHOLDER_BIAS)
        loss = torch.nn.functional.cross_entropy(logits + bias, torch.tensor(sample.response_ids), reduction="sum")
        (loss * sample.weight / num_tokens).backward()
    return {
        canonical_hf_name(name): p.grad if p.grad.ndim == 2 else p.grad[:, None]
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tied_checkpoint"])
def test_gradients_are_those_of_transformers(request: pytest.FixtureRequest, checkpoint: str) -> None:
    folder = request.getfixturevalue(checkpoint)
    provider = tp.open_provider(folder)
    assert provider.shape.tied_embeddings == (checkpoint == "tied_checkpoint")
    ours = tp.assemble(provider, run_world(1, lambda _: _our_gradients(folder)))
    errors = tp.relative_errors(ours, _reference_gradients(folder, provider))
    assert max(errors.values()) <= TOLERANCE, errors
