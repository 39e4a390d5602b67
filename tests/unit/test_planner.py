# SPDX-License-Identifier: Apache-2.0
"""The planner's arithmetic against transformers' modules and numbers computed by hand, its search, and its messages."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.schema import DataConfig, ModelConfig, ParallelConfig, RlConfig, RolloutConfig, TrainConfig
from megatron_rl.planner import long_rl, search
from megatron_rl.planner.activations import ActivationSplit, layer_saved
from megatron_rl.planner.command_line import main
from megatron_rl.planner.engine import engine_need
from megatron_rl.planner.flops import causal_pairs, head_flops, linear_flops, step_flops
from megatron_rl.planner.gpus import GIB, GPUS, gpu_of
from megatron_rl.planner.layout import chunks_in_flight
from megatron_rl.planner.memory import phase_names
from megatron_rl.planner.model import engine_params, load_planned_model, stage_params
from megatron_rl.planner.search import Machine, evaluate, helpful_knobs, layouts, with_frames, with_settings
from megatron_rl.planner.towers import smart_resize, tower_of
from megatron_rl.planner.workload import Assumptions, pack_step, workload_of
from megatron_rl.runtime.grid import Grid
from model_providers.known import KNOWN_CONFIGS

REPO = Path(__file__).parents[2]
RECIPE = str(REPO / "scripts/recipes/qwen2_5_vl_7b_longvideo.yaml")
A100 = Machine(gpu_of("a100-80g"), 8, Assumptions())
VL = [name for name in KNOWN_CONFIGS if "VL" in name]


def small_recipe(**changes: Any) -> RlConfig:
    """64 frames of 1280 x 720 in 128 patches each, 8 prompts, 4 responses of 512 tokens; Qwen2.5-VL-7B."""
    cfg = RlConfig(
        run_dir="runs/planned",
        model=ModelConfig(hf="Qwen2.5-VL-7B", recompute="full"),
        data=DataConfig(num_frames=64, min_pixels=100352, max_pixels=100352, max_prompt_tokens=5000),
        parallel=ParallelConfig(tensor=4),
        rollout=RolloutConfig(tensor=2, num_samples=4, max_response_tokens=512, gpu_memory_utilization=0.5),
        train=TrainConfig(num_steps=1, prompts_per_step=8, max_tokens_per_microbatch=8192),
    )
    return with_settings(cfg, {path.replace("__", "."): value for path, value in changes.items()})


# --------------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("name", VL)
def test_the_parameters_of_qwens_tower_are_those_of_transformers(name: str) -> None:
    import torch

    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    tower = tower_of(KNOWN_CONFIGS[name])
    assert tower is not None
    with torch.device("meta"):
        module = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(**KNOWN_CONFIGS[name]["vision_config"])
        )
    assert tower.num_params == sum(p.numel() for p in module.parameters())


def test_the_parameters_of_siglip_are_those_of_transformers() -> None:
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = KNOWN_CONFIGS["LongVILA-7B"]["vision_config"]
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    with torch.device("meta"):
        module = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **{key: vision[key] for key in keys}))
    projector = 2 * 4608 + (4608 * 3584 + 3584) + (3584 * 3584 + 3584)
    tower = tower_of(KNOWN_CONFIGS["LongVILA-7B"])
    assert tower is not None
    assert tower.num_params == sum(p.numel() for p in module.parameters()) + projector
    assert tower.tokens(10, tower.size_hw(720, 1280, 1, 1)) == 2570  # 448 / 14 / 2 squared, and a newline


def test_an_unknown_tower_is_not_taken_for_another() -> None:
    config = KNOWN_CONFIGS["Qwen2.5-VL-7B"]
    other = {**config, "vision_config": {**config["vision_config"], "model_type": "dinov2"}}
    with pytest.raises(ValueError, match="vision_config.model_type=dinov2: not planned yet; one of qwen2_5_vl"):
        tower_of(other)


def test_the_size_of_frames_is_that_of_transformers() -> None:
    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    draw = random.Random(0)
    for _ in range(500):
        height, width, low = draw.randint(30, 3000), draw.randint(30, 3000), draw.randint(3136, 200_000)
        bounds = low, low * draw.randint(1, 8)
        assert smart_resize(height, width, 28, *bounds) == theirs(height, width, 28, *bounds)
    with pytest.raises(ValueError, match="--video=3000x10: wider than 200 to 1"):
        smart_resize(10, 3000, 28, 3136, 10**6)


def test_flops_of_a_tower_by_hand() -> None:
    """One temporal patch of 224 x 224: 256 patches, 64 in a window of 112; every layer's linears, then the merger."""
    tower = tower_of(KNOWN_CONFIGS["Qwen2.5-VL-7B"])
    assert tower is not None
    layer = 4 * 1280**2 + 3 * 1280 * 3420
    linears = 256 * (32 * layer + 1176 * 1280) + 64 * (5120**2 + 5120 * 3584)
    attention = 256 * 2 * 1280 * (4 * 256 + 28 * 64)
    assert tower.flops(2, (224, 224)) == 2 * (linears + attention)


# ---------------------------------------------------------------------------------------------------- work and counting


def test_tokens_of_a_recipe() -> None:
    work = workload_of(small_recipe(), load_planned_model("Qwen2.5-VL-7B"), Assumptions(text_tokens=100))
    assert work.size_hw == (224, 420)  # 8 x 15 merged patches
    assert work.video_tokens == 32 * 120
    assert (work.prompt_tokens, work.longest, work.group_tokens) == (3940, 4452, 3940 + 4 * 512)
    by_rate = small_recipe(data__num_frames=0, data__fps=2.0, data__max_frames=50)
    model = load_planned_model("Qwen2.5-VL-7B")
    assert workload_of(by_rate, model, Assumptions(seconds=10.3)).num_frames == 20
    assert workload_of(by_rate, model, Assumptions(seconds=3600)).num_frames == 50


def test_packing_is_the_trainers_own() -> None:
    """8 groups of 3940 + 4 * 512 tokens on 2 ranks, 8192 a micro-batch: one group each, four micro-batches a rank; with
    a budget of one response each, sixteen."""
    work = workload_of(small_recipe(), load_planned_model("Qwen2.5-VL-7B"), Assumptions(text_tokens=100))
    packing = pack_step(work, 8192, 2, 3584, True, 1, 1)
    assert packing is not None
    assert (packing.num_microbatches, packing.bundles, packing.responses_a_bundle) == (4, 4, 4)
    assert packing.rows == 4 * work.group_tokens
    narrow = pack_step(work, work.longest, 2, 3584, True, 1, 1)
    assert narrow is not None
    assert (narrow.num_microbatches, narrow.bundles, narrow.rows) == (16, 16, 16 * work.longest)
    assert pack_step(work, work.longest - 1, 2, 3584, True, 1, 1) is None


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "num_microbatches", "expected"),
    [(1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 0, 2, 2), (4, 2, 0, 8, 11), (4, 2, 3, 8, 5)],
)
def test_chunks_in_flight(pipeline: int, virtual: int, stage: int, num_microbatches: int, expected: int) -> None:
    """Interleaved: 2 * (stages behind) + (chunks - 1) * stages before the first backward, and the one under way."""
    grid = Grid(8, pipeline=pipeline, virtual=virtual)
    assert chunks_in_flight(grid, stage, num_microbatches) == expected


def test_published_sizes() -> None:
    """Parameters of the language models, in their papers and on their model cards rounded."""
    known = {"Qwen2.5-VL-3B": 3.086e9, "Qwen2.5-VL-7B": 7.616e9, "Qwen2.5-VL-32B": 32.76e9, "Qwen2.5-VL-72B": 72.7e9}
    for name, expected in known.items():
        model = load_planned_model(name)
        assert stage_params(model, 1, 1, 0).total == pytest.approx(expected, rel=1e-3)
        assert engine_params(model, 1) == pytest.approx(expected, rel=1e-3)


def test_flops_by_hand() -> None:
    cfg, model = small_recipe(), load_planned_model("Qwen2.5-VL-7B")
    option = evaluate(cfg, model, A100)
    work, shape = option.case.work, model.shape
    layer = 3584 * (3584 * 2 + 512 * 2) + 3 * 3584 * 18944
    assert linear_flops(shape) == 2 * 28 * layer
    pairs = causal_pairs(work.prompt_tokens, 512, 4)
    assert pairs == work.prompt_tokens**2 / 2 + 4 * (work.prompt_tokens * 512 + 512**2 / 2)
    prompt = work.prompt_tokens  # which in the last layer has keys and values, but neither attends nor goes on
    linear = 8 * (work.group_tokens * linear_flops(shape) - prompt * 2 * (3584 * 3584 + 3 * 3584 * 18944))
    attention = 8 * 4 * 3584 * (28 * pairs - prompt**2 / 2)
    head = head_flops(shape, 8 * 4 * 512)
    flops = step_flops(option.case)
    assert flops.log_probs == pytest.approx(linear + attention + head)
    assert flops.update == pytest.approx(4 * linear + 4.5 * attention + 4 * head)


def test_a_fused_layer_by_hand() -> None:
    """Qwen2.5-VL-7B on a GPU at TP 4: 34 bytes a hidden column and what heads, rotary and feed-forward add."""
    shape = load_planned_model("Qwen2.5-VL-7B").shape
    saved = layer_saved(shape, ActivationSplit(tensor=4))
    assert saved["input norm"] == saved["norm before feed-forward"] == 3584 / 4 * 2 + 4 / 4
    assert saved["input of projection"] == saved["input of feed-forward"] == 3584 / 4 * 2
    assert saved["q"] + saved["k, v"] + saved["out"] == 2 * (2 * 896 + 2 * 128)
    assert saved["feed-forward"] == 3 * 18944 / 4 * 2
    assert saved["rotary"] == 4 * 128 * 2
    assert saved["lse"] == 4 * 28 / 4
    assert layer_saved(shape, ActivationSplit(tensor=4, recompute="full")) == {"layer input": 3584 / 4 * 2}


# ---------------------------------------------------------------------------------------------------- memory and search


def test_memory_of_a_recipe() -> None:
    """What can be computed by hand: weights, gradients, optimizer, the engine's share, its tokens."""
    option = evaluate(small_recipe(), load_planned_model("Qwen2.5-VL-7B"), A100)
    generate, update = (next(p for p in option.memory.phases if p.phase == name) for name in ("generate", "update"))
    params = 7_615_616_512 // 4 + 152_064 * 0  # every matrix is cut by four, norms and biases nearly nothing
    assert update.items["weights"] == pytest.approx(2 * params, rel=1e-3)
    assert update.items["gradients"] == pytest.approx(4 * params, rel=1e-3)
    step = option.memory.phases[-1]
    assert step.items["optimizer"] == pytest.approx(12 * params / 2, rel=1e-3) and "optimizer" not in update.items
    assert "activations" not in step.items and step.items["gradients"] == update.items["gradients"]
    engine = sum(generate.items[name] for name in ("vLLM weights", "vLLM working memory", "KV cache"))
    assert engine == pytest.approx(0.5 * A100.gpu.memory)
    assert option.memory.engine.kv_tokens == int(generate.items["KV cache"] // (28 * 2 * 2 * 128 * 2))
    assert option.memory.host["videos for the engine"] == 2 * 3840 * 3584 * 2  # two prompts a replica
    assert update.items["embeddings fetched"] == 4 * 3840 * 3584 * 2 / 4  # four prompts a rank, sliced over four
    assert "reference, and the policy meanwhile" not in option.memory.host
    with_kl = evaluate(small_recipe(algorithm__kl_coef=0.1), load_planned_model("Qwen2.5-VL-7B"), A100)
    assert with_kl.memory.host["reference, and the policy meanwhile"] == pytest.approx(4 * params, rel=1e-3)


def test_a_trained_tower_needs_more() -> None:
    model = load_planned_model("Qwen2.5-VL-7B")
    assert model.tower is not None
    frozen, trained = (evaluate(small_recipe(model__freeze_vision=f), model, A100) for f in (True, False))
    update, step = (phase.items for phase in trained.memory.phases[-2:])
    assert update["tower's gradients"] == step["tower's gradients"] == 4 * model.tower.num_params
    assert step["tower's optimizer"] == 12 * model.tower.num_params / 8 and "tower's optimizer" not in update
    assert update["embeddings fetched"] == 2 * frozen.memory.phases[-1].items["embeddings fetched"]
    assert step_flops(trained.case).update - step_flops(frozen.case).update == 3 * step_flops(frozen.case).encode


def test_phases_are_those_of_the_recipe() -> None:
    assert phase_names(small_recipe()) == ["encode", "generate", "update", "optimizer step"]
    kept = small_recipe(algorithm__kl_coef=0.1, train__updates_per_step=2)
    assert phase_names(kept)[2:] == ["log-probs", "update"]
    assert step_flops(evaluate(kept, load_planned_model("Qwen2.5-VL-7B"), A100).case).num_passes == 2
    tested = small_recipe(data__eval="eval.jsonl", eval__batch_size=32)  # 8 prompts a step
    assert phase_names(tested) == ["encode", "generate", "evaluate", "update", "optimizer step"]
    memory = evaluate(tested, load_planned_model("Qwen2.5-VL-7B"), A100).memory
    generate, test = memory.phases[1:3]
    assert test.items["embeddings made here"] == 4 * generate.items["embeddings made here"]
    assert memory.host["videos for the engine"] == 4 * 2 * 3840 * 3584 * 2


def test_where_optimizer_state_is_in_a_second_update() -> None:
    """It came back for the first, and stays unless it is told to go."""
    model, twice = load_planned_model("Qwen2.5-VL-7B"), small_recipe(train__updates_per_step=2)
    stays = evaluate(twice, model, A100)
    goes = evaluate(replace(twice, train=replace(twice.train, offload_optimizer=True)), model, A100)
    state = stays.memory.phases[-1].items["optimizer"]
    assert [phase.phase for phase in stays.memory.phases[-2:]] == ["log-probs", "update"]
    assert "optimizer" not in stays.memory.phases[-2].items
    assert [phase.phase for phase in goes.memory.phases[-2:]] == ["update", "optimizer step"]
    assert goes.memory.phases[-2].total == pytest.approx(stays.memory.phases[-1].total - state)
    assert goes.memory.phases[-1].items["optimizer"] == state
    assert "train.offload_optimizer=True" in {knob.setting for knob in helpful_knobs(stays, A100)}
    assert "train.offload_optimizer=True" not in {knob.setting for knob in helpful_knobs(goes, A100)}


def test_layouts_are_those_that_the_checks_allow() -> None:
    found = list(layouts(small_recipe(), load_planned_model("Qwen2.5-VL-7B"), 8))
    sizes = {(c.parallel.tensor, c.parallel.pipeline, c.parallel.context, c.rollout.tensor) for c in found}
    assert len(sizes) == len(found)
    assert {size[0] for size in sizes} == {1, 2, 4} == {size[3] for size in sizes}  # 28 heads over 8 ranks: no
    assert {size[1] for size in sizes} == {1, 2, 4}  # nor 28 layers over 8 stages
    assert (1, 1, 8, 1) in sizes
    assert all(8 % (t * p * c) == 0 for t, p, c, _ in sizes)


def test_the_suggestion_is_near_the_fastest_and_fits() -> None:
    options = search.search(small_recipe(), load_planned_model("Qwen2.5-VL-7B"), A100)
    best = search.suggested(options)
    assert best is not None and best.memory.fits
    assert best.times.step <= options[0].times.step * (1 + search.SAME_TIME)
    assert [o.memory.fits for o in options] == sorted((o.memory.fits for o in options), reverse=True)


def test_knobs_make_it_fit() -> None:
    """256 frames without recomputation in one micro-batch: recomputation, more context ranks and fewer frames help."""
    cfg = small_recipe(model__recompute="none", parallel__tensor=2, data__num_frames=512)
    model = load_planned_model("Qwen2.5-VL-7B")
    cfg = replace(with_frames(cfg, model, A100.assumed, 512), model=cfg.model)
    option = evaluate(cfg, model, A100)
    assert [phase.phase for phase in option.memory.over] == ["update"]
    knobs = {knob.setting: knob.option for knob in helpful_knobs(option, A100)}
    assert knobs["model.recompute=full"].memory.fits
    assert knobs["parallel.context=2"].shortage < option.shortage
    half = next(setting for setting in knobs if setting.startswith("data.num_frames=256 "))
    assert knobs[half].case.work.video_tokens == option.case.work.video_tokens // 2
    assert not any(setting.startswith("rollout.") for setting in knobs)
    order = [knob.option.memory.fits for knob in helpful_knobs(option, A100)]
    assert order == sorted(order, reverse=True)


def test_a_cache_that_is_too_small() -> None:
    cfg = small_recipe(rollout__gpu_memory_utilization=0.11)
    model = load_planned_model("Qwen2.5-VL-7B")
    option = evaluate(cfg, model, A100)
    [problem] = option.memory.engine.problems
    assert problem.startswith("rollout.gpu_memory_utilization=0.11: the KV cache holds")
    assert not option.memory.fits
    knobs = [knob.setting for knob in helpful_knobs(option, A100) if knob.option.memory.fits]
    assert "rollout.tensor=4" in knobs and "rollout.gpu_memory_utilization=0.3" in knobs
    work = workload_of(cfg, model, A100.assumed)
    exact = with_settings(cfg, {"rollout.kv_cache_gib": 1.0})
    assert engine_need(exact, model, A100.gpu, work).kv_cache == GIB


def test_long_rl() -> None:
    """3,600 frames fit on 8 x A100-80G, those of 257 tokens too; 64 GPUs take more than 8."""
    found = list(long_rl.claims(GPUS["a100-80g"], Assumptions()))
    fits = {(claim.title, claim.gpus): claim.option is not None for claim in found}
    assert fits["Qwen2.5-VL-3B", 8] and fits["LongVILA-7B at 71 tokens a frame", 8]
    most = {(claim.title, claim.gpus): claim.limit.num_frames for claim in found}
    assert fits["LongVILA-7B", 8] and most["LongVILA-7B", 8] < most["LongVILA-7B at 71 tokens a frame", 8] / 3
    assert most["LongVILA-7B", 64] > 8192
    for title in {claim.title for claim in found}:
        assert most[title, 64] > most[title, 8] > 0
    for claim in found:
        assert (claim.option is not None) == (claim.limit.num_frames >= claim.num_frames)
        assert claim.limit.option is not None and claim.limit.option.memory.fits


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main([RECIPE, "data.num_frames=128", "--gpus", "8", "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["work"]["num_frames"] == 128
    assert plan["recipe"]["fits"] and plan["largest_frames"]["num_frames"] > 128
    assert set(plan["recipe"]["memory"]) == {"encode", "generate", "update", "optimizer step"}
    assert "Predictions, not measurements" in capsys.readouterr().out
    longer = ["data.num_frames=1024", "train.max_tokens_per_microbatch=70000"]  # 61k tokens; the recipe takes 18k
    assert main([RECIPE, *longer]) == 1
    assert "data.max_prompt_tokens=18432: a prompt has" in " ".join(capsys.readouterr().out.split())


def test_a_narrow_window_cuts_no_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    larger = ["data.num_frames=1024", "data.max_prompt_tokens=62000", "train.max_tokens_per_microbatch=78400"]
    assert main([RECIPE, "model.recompute=none", *larger]) == 1
    said = capsys.readouterr().out
    column = "".join(line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│"))
    assert "model.recompute=selective" in column and "…" not in said


WRONG = [
    (["--gpus", "0", "--gpu", "abacus", "--video", "wide"], ["--gpus=0:", "--gpu=abacus:", "--video=wide:"]),
    (["parallel.tensor=8"], ["parallel.tensor=8: does not divide 28 attention heads"]),
    (["--gpus", "6"], ["parallel.tensor=4: does not divide 6 ranks"]),
    (
        ["train.max_tokens_per_microbatch=1000", "data.max_prompt_tokens=1000"],
        ["train.max_tokens_per_microbatch=1000: a prompt with one", "data.max_prompt_tokens=1000: a prompt has"],
    ),
    (["model.hf=nowhere"], ["model.hf=nowhere: has no config.json"]),
    (["data.num_frames=0"], ["data.num_frames=0: data.fps is 0 as well"]),
]


@pytest.mark.parametrize(("arguments", "messages"), WRONG, ids=lambda value: value[0])
def test_what_is_wrong_is_said(arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([RECIPE, *arguments]) == 2
    said = capsys.readouterr().err
    for message in messages:
        assert message in said


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_rl.plan import main; "
        f"assert main([{RECIPE!r}]) == 0; "
        "heavy = {'torch', 'transformers', 'vllm', 'megatron.core'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
