# SPDX-License-Identifier: Apache-2.0
"""The rollout engine's promises: seeds, forbidden tokens, truncation, refusals, caches, and leaving the trainer alone.

Each world is started once; the tests look at what its ranks reported.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.rollout import vllm_engine
from megatron_rl.rollout.requests import engine_input
from megatron_rl.rollout.vllm_engine import EngineSettings, VllmEngine, prompt_seed
from megatron_rl.runtime.device import choose_backend
from megatron_rl.types import Completion, EncodedMedia, EngineModel, Prompt, Sampling
from model_providers.provider import open_provider
from tests.rollout_parts import fill_with_hf_weights, join_world, open_plain_engine, text_prompt, video_prompt
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

SAMPLING = Sampling(num_samples=4, temperature=1.0, max_response_tokens=8, seed=5)
GREEDY = replace(SAMPLING, num_samples=1, greedy=True)
ONE_TOKEN = replace(GREEDY, max_response_tokens=1)
STOP_TOKENS = tuple(range(40))
NOTHING = EncodedMedia({})
TEXT = tuple(range(60, 90))
GRID = (3, 20, 20)  # 300 tokens: more than one block of the KV cache, so that prefixes are shared
LM_HEAD = "language_model.lm_head.weight"


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in completions]


def logprobs(completions: list[Completion]) -> Tensor:
    return torch.tensor([x for c in completions for x in c.logprobs])


def embeds_of(prompt: Prompt, seed: int) -> EncodedMedia:
    generator = torch.Generator().manual_seed(seed)
    made = {v.key: torch.randn(v.num_tokens, 128, generator=generator) for v in prompt.media}
    return EncodedMedia(made, made_by=str(seed))


def _tampered_input(prompt: Prompt, *args: Any) -> Any:
    """The engine's input without the last token, as a bug of ours could make it."""
    request = engine_input(prompt, *args)
    return {**request, "prompt_token_ids": request["prompt_token_ids"][:-1]}


# ---------------------------------------------------------------------------------------- one rank, one engine


def _observe(rank: int, folder: Path) -> dict[str, Any]:
    engine = open_plain_engine(folder, max_model_len=512, eos_token_ids=STOP_TOKENS)
    seen: dict[str, Any] = {}
    with pytest.raises(RuntimeError) as unfilled:
        engine.generate([text_prompt(0, TEXT)], NOTHING, SAMPLING)
    seen["unfilled"] = str(unfilled.value)
    fill_with_hf_weights(engine, folder)
    seen |= _seeds(engine) | _refusals(engine, folder) | _caches(engine, folder)
    seen["many"] = engine.generate([text_prompt(0, TEXT)], NOTHING, replace(SAMPLING, num_samples=32))
    return seen | _forbidden(engine, folder)


def _seeds(engine: VllmEngine) -> dict[str, Any]:
    prompts = [text_prompt(i, TEXT) for i in (0, 1)]
    return {
        "two prompts": engine.generate(prompts, NOTHING, SAMPLING),
        "again": engine.generate(prompts, NOTHING, SAMPLING),
        "alone": engine.generate(prompts[1:], NOTHING, SAMPLING),
        "next step": engine.generate(prompts, NOTHING, replace(SAMPLING, step=1)),
        "other run": engine.generate(prompts, NOTHING, replace(SAMPLING, seed=6)),
        "greedy": engine.generate(prompts, NOTHING, GREEDY),
    }


def _refusals(engine: VllmEngine, folder: Path) -> dict[str, Any]:
    from vllm.exceptions import VLLMValidationError

    seen = {}
    with mock.patch.object(vllm_engine, "engine_input", _tampered_input), pytest.raises(RuntimeError) as caught:
        engine.generate([text_prompt(7, (60, 61, 62))], NOTHING, SAMPLING)
    seen["mismatch"] = str(caught.value)
    too_long = video_prompt(8, open_provider(folder), (6, 20, 20))
    with pytest.raises(VLLMValidationError) as caught_long:
        engine.generate([too_long], embeds_of(too_long, 0), SAMPLING)
    seen["too long"] = str(caught_long.value)
    seen["after refusals"] = engine.generate([text_prompt(i, TEXT) for i in (0, 1)], NOTHING, SAMPLING)
    return seen


def _caches(engine: VllmEngine, folder: Path) -> dict[str, Any]:
    """Log-probability of the likeliest next token after one long prompt: other pictures, other times, other weights."""
    provider = open_provider(folder)
    prompt = video_prompt(9, provider, GRID)
    slow = video_prompt(9, provider, GRID, seconds_per_grid=50.0)
    red, blue = embeds_of(prompt, 1), embeds_of(prompt, 2)

    def answer(which: Prompt, embeds: EncodedMedia) -> Tensor:
        return logprobs(engine.generate([which], embeds, ONE_TOKEN))

    seen = {"red": answer(prompt, red), "blue": answer(prompt, blue), "slow": answer(slow, red)}
    engine.weights_changed(1)  # nothing changed, but nothing is cached any more
    seen |= {"blue alone": answer(prompt, blue)}
    engine.weights_changed(2)
    seen |= {"slow alone": answer(slow, red)}
    engine.weights_changed(3)
    seen |= {"before": answer(prompt, red)}
    values = [p for name, p in engine.parameters().items() if "qkv_proj" in name]
    for value in values:
        value.neg_()
    seen["stale"] = answer(prompt, red)
    engine.weights_changed(4)
    seen["fresh"] = answer(prompt, red)
    for value in values:
        value.neg_()
    engine.weights_changed(5)
    seen["back"] = answer(prompt, red)
    return seen


def _forbidden(engine: VllmEngine, folder: Path) -> dict[str, Any]:
    """A head under which one of the two placeholder tokens always has the largest logit, and all others are equal."""
    from vllm import SamplingParams

    first, second = open_provider(folder).forbidden_tokens
    head = engine.parameters()[LM_HEAD]
    direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    head.zero_()
    head[first], head[second] = direction, -direction
    engine.weights_changed(6)
    free = SamplingParams(temperature=0.0, max_tokens=4)
    outputs = engine._llm.generate([{"prompt_token_ids": list(TEXT)}], [free], use_tqdm=False)
    return {
        "placeholders": (first, second),
        "without bias": tuple(outputs[0].outputs[0].token_ids),
        "with bias": engine.generate([text_prompt(3, TEXT)], NOTHING, replace(SAMPLING, num_samples=16)),
    }


@pytest.fixture(scope="module")
def observed(tiny_checkpoint: Path) -> dict[str, Any]:
    [seen] = run_world(1, _observe, tiny_checkpoint, timeout=180)
    return seen


def test_generating_before_a_sync_is_refused(observed) -> None:
    assert "sync before generating" in observed["unfilled"]


def test_completions_come_in_order_of_prompt_and_sample(observed) -> None:
    places = [(c.prompt_id, c.sample_index) for c in observed["two prompts"]]
    assert places == [(p, s) for p in (0, 1) for s in range(4)]


def test_every_prompt_sample_step_and_run_has_noise_of_its_own(observed) -> None:
    two, later, other = (tokens(observed[name]) for name in ("two prompts", "next step", "other run"))
    assert len(set(two)) == 8, "samples of equal prompts repeat"
    assert set(two).isdisjoint(later) and set(two).isdisjoint(other) and set(later).isdisjoint(other)


def test_same_seed_step_and_prompt_draw_the_same_whatever_else_runs(observed) -> None:
    assert tokens(observed["again"]) == tokens(observed["two prompts"]) == tokens(observed["after refusals"])
    assert tokens(observed["alone"]) == tokens(observed["two prompts"])[4:]
    torch.testing.assert_close(logprobs(observed["again"]), logprobs(observed["two prompts"]), rtol=0, atol=1e-5)


def test_greedy_is_one_answer_without_noise(observed) -> None:
    first, second = tokens(observed["greedy"])
    assert first == second


def test_truncated_means_stopped_by_length(observed) -> None:
    many = observed["many"]
    assert {c.truncated for c in many} == {True, False}, "only one kind, so nothing is tested"
    for c in many:
        assert not set(c.token_ids[:-1]) & set(STOP_TOKENS)
        assert c.truncated == (c.token_ids[-1] not in STOP_TOKENS)
        assert len(c.token_ids) == 8 if c.truncated else len(c.token_ids) <= 8
        assert len(c.logprobs) == len(c.token_ids) and max(c.logprobs) <= 0
        assert c.text == " ".join(map(str, c.token_ids))


def test_a_prompt_that_arrives_changed_is_an_error_with_a_diff(observed) -> None:
    message = observed["mismatch"]
    assert "text:7" in message and "2 tokens instead of 3" in message
    assert "first difference at 2 ([] instead of [62])" in message


def test_a_prompt_over_max_model_len_is_refused_with_both_lengths(observed) -> None:
    assert "605" in observed["too long"] and "512" in observed["too long"]


def test_cached_prefixes_know_their_pictures_and_times(observed) -> None:
    """Equal tokens and an equal key must not bring back what was computed for other embeddings or other positions."""
    assert float((observed["red"] - observed["blue"]).abs().max()) > 1e-2
    assert float((observed["red"] - observed["slow"]).abs().max()) > 1e-3
    for name in ("blue", "slow"):
        torch.testing.assert_close(observed[name], observed[f"{name} alone"], rtol=0, atol=1e-4)


def test_new_weights_empty_the_prefix_cache(observed) -> None:
    assert float((observed["stale"] - observed["fresh"]).abs().max()) > 1e-3, "nothing was cached, so nothing is tested"
    torch.testing.assert_close(observed["back"], observed["before"], rtol=0, atol=1e-4)


def test_forbidden_tokens_are_never_sampled(observed) -> None:
    placeholders = set(observed["placeholders"])
    assert set(observed["without bias"]) <= placeholders, "the head does not prefer them, so nothing is tested"
    sampled = {token for c in observed["with bias"] for token in c.token_ids}
    assert len(sampled) > 20 and sampled.isdisjoint(placeholders)


def test_prompt_seeds_are_far_apart() -> None:
    """vLLM gives sample k the seed + k, so neighbours would share noise."""
    seeds = sorted(prompt_seed(run, step, prompt) for run in (1, 2) for step in range(30) for prompt in range(30))
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024
    assert prompt_seed(1, 23, 4) != prompt_seed(12, 3, 4)


# ------------------------------------------------------------------------------- two ranks, one engine after another


def _two_engines(rank: int, folder: Path) -> dict[str, Any]:
    """A tensor parallel engine, then one replica per rank."""
    prompts = [text_prompt(0, TEXT), video_prompt(1, open_provider(folder), GRID)]
    join_world()
    seen: dict[str, Any] = {}
    for tensor in (2, 1):
        engine = open_plain_engine(folder, tensor, max_model_len=512)
        fill_with_hf_weights(engine, folder)
        seen[f"tp{tensor}"] = engine.generate(prompts, embeds_of(prompts[1], 3), SAMPLING)
        engine.close()
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        seen[f"sum{tensor}"] = float(total)
    return seen


@pytest.fixture(scope="module")
def two_ranks(tiny_checkpoint: Path) -> list[dict[str, Any]]:
    return run_world(2, _two_engines, tiny_checkpoint, timeout=180)


def test_tensor_parallel_ranks_see_the_same_completions(two_ranks) -> None:
    assert two_ranks[0]["tp2"] == two_ranks[1]["tp2"]
    assert len(two_ranks[0]["tp2"]) == 8


def test_a_second_engine_of_another_size_draws_the_same(two_ranks) -> None:
    assert tokens(two_ranks[0]["tp1"]) == tokens(two_ranks[1]["tp1"]) == tokens(two_ranks[0]["tp2"])
    torch.testing.assert_close(logprobs(two_ranks[1]["tp1"]), logprobs(two_ranks[0]["tp2"]), rtol=0, atol=1e-4)


def test_closing_an_engine_leaves_the_trainers_collectives_working(two_ranks) -> None:
    assert [(seen["sum2"], seen["sum1"]) for seen in two_ranks] == [(3.0, 3.0)] * 2


# -------------------------------------------------------------------------------------------------- very long videos


def _long_videos(rank: int, folder: Path) -> tuple[list[Completion], str]:
    from vllm.exceptions import VLLMValidationError

    provider = open_provider(folder)
    engine = open_plain_engine(folder, max_model_len=17_000)
    fill_with_hf_weights(engine, folder)
    fits, too_long = video_prompt(0, provider, (64, 32, 32)), video_prompt(1, provider, (70, 32, 32))
    assert fits.media[0].num_tokens == 16_384
    completions = engine.generate([fits], embeds_of(fits, 0), replace(SAMPLING, num_samples=2))
    with pytest.raises(VLLMValidationError) as caught:
        engine.generate([too_long], embeds_of(too_long, 0), SAMPLING)
    return completions, str(caught.value)


@pytest.mark.full
def test_a_video_of_16k_tokens_is_accepted_and_one_over_the_limit_is_named(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 32_768
    (folder / "config.json").write_text(json.dumps(config))
    [(completions, message)] = run_world(1, _long_videos, folder, timeout=300)
    assert len(completions) == 2 and all(c.token_ids for c in completions)
    assert "17925" in message and "17000" in message


def test_nothing_is_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr("vllm.LLM", lambda **arguments: given.append(arguments))
    cpu = choose_backend("cpu", "float32")
    for backend in (cpu, replace(cpu, engine_compiles=True)):
        for eager in (False, True):
            settings = EngineSettings(EngineModel("folder"), 1, 64, 4, 1 << 20, 0.5, eager)
            vllm_engine._build(settings, backend)
            assert given.pop()["enforce_eager"] == (eager or backend is cpu)
