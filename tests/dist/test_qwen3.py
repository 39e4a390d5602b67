# SPDX-License-Identifier: Apache-2.0
"""Dense text models: Qwen3 (q/k norms, a head size of its own) and Qwen2 (QKV bias), from weights to the RL loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools.hf_to_mcore import hf_to_mcore
from checkpoint_tools.mcore_to_hf import mcore_to_hf
from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.config.schema import (
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RlConfig,
)
from megatron_rl.runtime import parallel
from megatron_rl.runtime.grid import Grid
from megatron_rl.weight_sync.plan import build_plan
from megatron_rl.weight_sync.resharder import Resharder
from megatron_rl.weight_sync.shape_check import check_fit
from model_providers.provider import open_provider
from model_providers.qwen3.weights import shape_of
from tests import tiny_policy as tp
from tests.rollout_parts import as_sft, fill_with_hf_weights, open_plain_engine, small_config
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

KINDS = ("qwen3", "qwen3_tied", "qwen2", "qwen3_moe", "qwen2_llama3", "qwen3_yarn")
DENSE = KINDS[:3]
ORIGINAL_POSITIONS = 64  # of pretraining: so few that scaling changes most frequencies
SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 64.0},
}
TOLERANCE = 1e-4
SAME = 1e-5


def write_text_checkpoint(folder: Path, kind: str) -> Path:
    """Random weights as transformers writes them; no vector is left at its start value. Heads of Qwen3 are wider than
    hidden_size / num_heads."""
    import transformers

    from model_providers.qwen3.tiny import HEAD_DIM, tiny
    from scripts.make_tiny_checkpoint import VOCAB_SIZE, make_tokenizer

    tokenizer = make_tokenizer()
    settings = tiny(VOCAB_SIZE) | {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": "tied" in kind}
    scaling = kind.rpartition("_")[2]
    if scaling in SCALINGS:
        kept = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL_POSITIONS}
        settings["rope_parameters"] = {"rope_type": scaling, **SCALINGS[scaling], **kept}
    torch.manual_seed(5)
    if kind.startswith("qwen2"):
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    elif kind == "qwen3_moe":
        settings |= {"hidden_size": 96, "head_dim": HEAD_DIM, "norm_topk_prob": True}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings | experts))
    else:
        wide_heads = {"hidden_size": 96, "head_dim": HEAD_DIM}
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings | wide_heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name) + 0.1 * torch.randn(parameter.shape))
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind: checkpoint folder}. Read only."""
    root = tmp_path_factory.mktemp("text")
    return {kind: write_text_checkpoint(root / kind, kind) for kind in KINDS}


def text_samples(provider: Any) -> list[Any]:
    lengths = [(9, 4), (5, 7), (17, 5), (1, 1)]
    return [tp.sample(provider, seed, text, response) for seed, (text, response) in enumerate(lengths)]


def _measure(folder: Path, tensor: int, pipeline: int, recompute: str, expert: int) -> Any:
    """(log-probabilities by sample on the last stage, gradient pieces) of this rank."""
    mesh = tp.join(tensor, pipeline, expert)
    trainer = tp.open_trainer(folder, mesh, tp.MEASURE, recompute=recompute)
    samples = text_samples(trainer.provider)
    batches = trainer.pack(samples)
    by_sample: dict[int, Tensor] = {}
    for batch, values in zip(batches, trainer.policy.logprobs(batches, {}), strict=True):
        if values is not None:
            lengths = [len(samples[i].response_ids) for i in batch.samples]
            by_sample |= dict(zip(batch.samples, values.split(lengths), strict=True))
    trainer.policy.train(tp.unscored(batches), {}, NllLoss(), step=0)
    return by_sample, tp.gradients(trainer)


def _reference(folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(log-probabilities by sample, gradients by name) of transformers, one sample at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = text_samples(open_provider(folder))
    num_tokens = sum(len(s.response_ids) for s in samples)
    logprobs = []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
        logits = model(input_ids=ids).logits[0, len(sample.prompt.token_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        (-chosen.sum() * sample.weight / num_tokens).backward()
        logprobs.append(chosen.detach())
    grads = {name: p.grad for name, p in model.named_parameters()}
    return logprobs, {name: part for whole, grad in grads.items() for name, part in _as_published(whole, grad)}


def _as_published(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """transformers holds all experts of a layer in two tensors and writes three for each."""
    if not name.endswith((".gate_up_proj", ".down_proj")):
        yield name, tensor if tensor.ndim == 2 else tensor[:, None]
        return
    layer, _, kind = name.rpartition(".")
    for index, expert in enumerate(tensor):
        parts = (
            zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if kind == "gate_up_proj" else [(kind, expert)]
        )
        yield from ((f"{layer}.{index}.{part}.weight", value) for part, value in parts)


def _gradients_over_ranks(rank: int, folder: Path, context: int, comm: str, expert: int) -> Any:
    """Gradient pieces of this rank, with the tokens spread over context parallel ranks."""
    trainer = tp.open_trainer(folder, tp.join(context=context, comm=comm, expert=expert), tp.MEASURE)
    batches = trainer.pack(text_samples(trainer.provider))
    trainer.policy.train(tp.unscored(batches), {}, NllLoss(), step=0)
    return tp.gradients(trainer)


@pytest.mark.parametrize(("comm", "expert"), [("all_gather", 1), ("p2p", 2), ("a2a", 2)])
def test_experts_learn_alike_from_tokens_of_several_ranks(checkpoints: dict[str, Path], comm: str, expert: int) -> None:
    [folder] = [path for kind, path in checkpoints.items() if "moe" in kind]
    provider = open_provider(folder)
    truth = tp.assemble(provider, run_world(1, _gradients_over_ranks, folder, 1, "all_gather", 1))
    found = tp.assemble(provider, run_world(2, _gradients_over_ranks, folder, 2, comm, expert))
    errors = tp.relative_errors(found, truth)
    assert max(errors.values()) <= SAME, errors


LAYOUTS = [(1, 1, "none", 1), (2, 1, "none", 1), (1, 2, "full", 1), (2, 2, "selective", 1)]
WITH_EXPERTS = [(1, 1, "none", 2), (2, 1, "full", 2), (2, 2, "none", 2)]  # the first has two data parallel ranks


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_gradients_are_those_of_transformers(checkpoints: dict[str, Path], kind: str) -> None:
    """Also of a q norm, which every tensor parallel rank holds whole and uses on its own heads only."""
    folder = checkpoints[kind]
    logprobs, truth = _reference(folder)
    assert any("q_norm" in name for name in truth) == kind.startswith("qwen3")
    gradients = {}
    for layout in LAYOUTS + WITH_EXPERTS if "moe" in kind else LAYOUTS:
        tensor, pipeline, _, expert = layout
        ranks = run_world(max(tensor, expert) * pipeline, lambda _, *args: _measure(folder, *args), *layout)
        by_sample = {i: values for rank in ranks for i, values in rank[0].items()}  # from the last stage
        assert sorted(by_sample) == list(range(len(logprobs)))
        gap = max(float((by_sample[i] - expected).abs().max()) for i, expected in enumerate(logprobs))
        assert gap <= TOLERANCE, (layout, gap)
        gradients[layout] = tp.assemble(open_provider(folder), [pieces for _, pieces in ranks])
    errors = tp.relative_errors(gradients[LAYOUTS[0]], truth)
    assert max(errors.values()) <= TOLERANCE, errors
    for layout, found in gradients.items():
        errors = tp.relative_errors(found, gradients[LAYOUTS[0]])
        assert max(errors.values()) <= SAME, (layout, errors)


def _sync(rank: int, folder: Path, tensor: int, pipeline: int, rollout: int, expert: int) -> list[str]:
    """Names of parameters in which a sync and vLLM's own loader differ, both from random weights."""
    world = parallel.world_size()
    trainer = Grid(world, tensor=tensor, pipeline=pipeline, expert=expert)
    mesh = parallel.initialize(tp.BACKEND, trainer, Grid(world, tensor=rollout))
    provider = open_provider(folder)
    model = provider.build_language(tp.BACKEND, mesh)
    provider.load_language(model, mesh)
    source = {name: p.data for name, p in model.named_weights().items()}
    engine = open_plain_engine(folder, rollout)
    target = engine.parameters()
    check_fit(provider.weight_map, mesh.trainer, mesh.engine, rank, source, target)
    plan = build_plan(provider.weight_map, provider.shape.num_layers, mesh.trainer, mesh.engine)
    for parameter in target.values():
        parameter.normal_()
    Resharder(plan, rank, source, target, 1 << 20).sync(0)
    synced = {name: p.clone() for name, p in target.items()}
    for parameter in target.values():
        parameter.normal_()
    fill_with_hf_weights(engine, folder)
    assert synced.keys() == target.keys() == engine.parameters().keys() and len(synced) >= 12
    return [name for name, p in engine.parameters().items() if not torch.equal(p, synced[name])]


@pytest.mark.parametrize(
    ("kind", "tensor", "pipeline", "rollout", "expert"),
    [
        ("qwen3", 1, 1, 1, 1),
        ("qwen3", 2, 1, 1, 1),
        ("qwen3", 1, 2, 2, 1),
        ("qwen3_tied", 1, 2, 2, 1),
        ("qwen2", 2, 1, 2, 1),
        ("qwen3_moe", 1, 2, 2, 1),
        ("qwen3_moe", 2, 1, 1, 2),
        ("qwen3_moe", 1, 1, 2, 2),
    ],
)
def test_sync_gives_what_vllm_loads(
    checkpoints: dict[str, Path], kind: str, tensor: int, pipeline: int, rollout: int, expert: int
) -> None:
    world = max(tensor * pipeline, rollout, expert)
    ranks = run_world(world, _sync, checkpoints[kind], tensor, pipeline, rollout, expert, timeout=180)
    assert ranks == [[]] * world


@pytest.mark.parametrize("kind", DENSE)
def test_round_trip_keeps_every_key_and_bit(checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    hf_to_mcore(checkpoints[kind], tmp_path / "mcore", 2, 2)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoints[kind], tmp_path / "hf"))
    assert after.keys() == before.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e4}, "rope_type=yarn: original_max_pos"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type=longrope"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_what_the_trainer_would_compute_otherwise_is_refused(
    checkpoints: dict[str, Path], setting: dict[str, Any], why: str
) -> None:
    config = json.loads((checkpoints["qwen3"] / "config.json").read_text())
    with pytest.raises(ValueError, match=f"model.hf: {why}"):
        shape_of(config | ({"rope_parameters": None} if "rope_scaling" in setting else {}) | setting)


REWARD = """
def variety(prompts, completions):
    return [{"overall": len(set(c.token_ids)) / 12} for c in completions]
"""


def text_config(folder: Path, root: Path, rows: Sequence[dict[str, Any]]) -> RlConfig:
    (root / "reward.py").write_text(REWARD)
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = small_config(folder, root / "run", tensor=2, rollout_tensor=2)
    return replace(
        cfg,
        data=replace(cfg.data, train=str(root / "train.jsonl"), shuffle=False, max_bad_fraction=0.5),
        train=replace(cfg.train, num_steps=1, prompts_per_step=len(rows), optimizer=OptimizerConfig(lr=1e-3)),
        reward=RewardConfig(name=f"{root / 'reward.py'}:variety"),
        eval=EvalConfig(at_start=False, at_end=False),
        checkpoint=CheckpointConfig(export_hf=True),
    )


def _run_job(rank: int, cfg: RlConfig, job: str) -> None:
    from megatron_rl import sft, train

    if job == "rl":
        train.run(cfg)
    else:
        sft.run(as_sft(cfg))


@pytest.mark.parametrize(
    ("kind", "job"),
    [
        ("qwen3", "rl"),
        ("qwen2", "rl"),
        ("qwen3_tied", "sft"),
        ("qwen3_moe", "rl"),
        ("qwen2_llama3", "rl"),
        ("qwen3_yarn", "rl"),
    ],
)
def test_text_rows_are_learned_and_a_video_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, job: str
) -> None:
    from transformers import AutoModelForCausalLM

    questions = [{"problem": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in (2, 3)]
    video = {"problem": "What happens?", "answer": "B", "videos": ["film.mp4"]}
    cfg = text_config(checkpoints[kind], tmp_path, [questions[0], video, questions[1]])
    if kind == "qwen3_moe":  # checkpoint_tools cannot read experts yet
        cfg = replace(cfg, checkpoint=CheckpointConfig(), parallel=ParallelConfig(expert=2))
    run_world(2, _run_job, cfg, job)
    (bad,) = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert "film.mp4: this model takes no video" in bad["reason"]
    (metrics,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    if job == "rl":
        assert metrics["rollout/num_groups"] == 2.0 and metrics["rollout/logprob_gap_max"] < TOLERANCE
    if kind == "qwen3_moe":
        return
    exported = Path(json.loads((tmp_path / "run/summary.json").read_text())["hf_export"])
    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (checkpoints[kind], exported)
    )
    moved = {name for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True) if (p != q).any()}
    assert moved == {name for name, _ in before.named_parameters()}
