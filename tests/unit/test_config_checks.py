# SPDX-License-Identifier: Apache-2.0
"""Cross-field checks: one wrong setting gives one message that names it; many give one list."""

from __future__ import annotations

import json

import pytest

from megatron_rl.config import checks
from megatron_rl.config.checks import _RANGES, check
from megatron_rl.config.io import keys_of, load_config
from megatron_rl.config.schema import RlConfig, SftConfig

HF = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "vocab_size": 151936,
}


@pytest.fixture(autouse=True)
def no_wandb_login(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """The folders here hold a config.json alone; tests/unit/test_hf_files.py has whole ones."""
    monkeypatch.setattr(checks, "_fits_files", lambda *_: ())


@pytest.fixture
def make(tmp_path):
    """A configuration whose files all exist, with overrides."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(HF))
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(
        f"run_dir: runs/a\nmodel: {{hf: {tmp_path}/model}}\n"
        f"train: {{num_steps: 3}}\ndata: {{train: {tmp_path}/train.jsonl}}\n"
    )
    return lambda *overrides, schema=RlConfig: load_config(str(tmp_path / "recipe.yaml"), schema, overrides)


def problems(cfg, world_size=1, job="rl", require_files=True) -> list[str]:
    try:
        check(cfg, world_size, job, require_files)
    except ValueError as error:
        title, *found = str(error).splitlines()
        assert title == f"configuration of {cfg.run_dir}: {len(found)} problem{'s' * (len(found) > 1)}"
        return [line.strip() for line in found]
    return []


def test_the_defaults_pass(make):
    assert problems(make()) == []
    assert problems(make(schema=SftConfig), job="sft") == []
    for name in ("reward/my part", "critic/score/mean", "eval/blind_accuracy", "sft/nll"):
        assert problems(make(f"checkpoint.best_metric={name}")) == []
    assert problems(make("parallel.tensor=2", "parallel.pipeline=2", "rollout.tensor=4"), world_size=8) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.num_samples=0", "rollout.num_samples=0: out of range; it must be at least 1"),
        ("train.num_steps=0", "train.num_steps=0: out of range; it must be at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep=0: out of range; it must be at least 1"),
        ("train.optimizer.lr=-1e-6", "train.optimizer.lr=-1e-06: out of range; it must be at least 0"),
        ("rollout.temperature=0", "rollout.temperature=0.0: out of range; it must be at least 0.01"),
        ("rollout.gpu_memory_utilization=1.5", "it must be above 0 and at most 1"),
        (
            "reward.terms={acuracy: 1}",
            "reward.terms.acuracy=1.0: reward.name=r1v has no such part; it has accuracy, format",
        ),
        ("train.optimizer.betas=[0.9, 1]", "train.optimizer.betas=(0.9, 1.0): out of range"),
        ("data.fps=2", "data.fps=2.0: data.num_frames=32 is set as well"),
        ("data.num_frames=0", "data.num_frames=0: data.fps is 0 as well"),
        ("data.min_pixels=700000", "data.min_pixels=700000: exceeds data.max_pixels=602112"),
        ("eval.every=5", "eval.every=5: there is nothing to evaluate; set data.eval"),
        ("eval.blind=true", "eval.blind=true: there is nothing to evaluate"),
        ("rollout.max_model_len=5119", "data.max_prompt_tokens + rollout.max_response_tokens = 5120"),
        ("train.max_tokens_per_microbatch=5119", "the longest sequence has 5120 tokens and must fit"),
        ("train.updates_per_step=3", "train.prompts_per_step=128: is not a multiple of train.updates_per_step=3"),
        ("data.frames_per_chunk=0", "data.frames_per_chunk=0: out of range; it must be at least 1"),
        ("data.cache_gib=0", "data.cache_gib=0.0: out of range; it must be above 0"),
        ("max_phase_minutes=-1", "max_phase_minutes=-1.0: out of range; it must be at least 0"),
        (
            "checkpoint.best_metric=eval/acuracy",
            "checkpoint.best_metric=eval/acuracy: no step has a metric of that name; did you mean eval/accuracy?",
        ),
        ("checkpoint.best_metric=x", "no step has a metric of that name; take one of eval/accuracy, "),
        ("rollout.only=true", "rollout.only=true: the rollouts would be lost; set rollout.save_to"),
        ("rollout.num_samples=1", "algorithm.advantage=grpo compares the responses of a prompt; use 2 or more"),
        ("algorithm.clip_low=1", "algorithm.clip_low=1.0: out of range; it must be between 0 and 1"),
        ("algorithm.clip_dual=1", "algorithm.clip_dual=1.0: out of range; it must be above 1"),
        ("algorithm.filter_low=0.99", "algorithm.filter_low=0.99: is not below algorithm.filter_high=0.99"),
        ("reward.name=maths", "reward.name=maths: no such reward; did you mean 'math'?"),
        ("reward.name=none.py:f", "there is no Python file none.py"),
        ("data.train=", "data.train=: there is nothing to train on"),
        ("data.train=none.jsonl", "data.train=none.jsonl: no such file"),
        ("data.eval=none.jsonl", "data.eval=none.jsonl: no such file"),
        ("data.format_prompt=none.jinja", "data.format_prompt=none.jinja: no such file"),
        ("model.weights_from=none", "model.weights_from=none: no such folder"),
        ("model.hf=none", "model.hf=none: has no config.json"),
        ("rollout.replay_from=none", "rollout.replay_from=none: no such folder"),
        ("run_dir=", "run_dir=: out of range; it must be the name of a folder"),
        ("log.wandb=online", "log.wandb=online: not logged in"),
    ],
)
def test_one_mistake_one_message(make, override, expected):
    found = problems(make(override))
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["parallel.tensor=2"], 3, "parallel.tensor=2: does not divide 3 ranks"),
        (
            ["parallel.context=3", "parallel.context_comm=a2a"],
            3,
            "parallel.context_comm=a2a: 16 heads / tensor=1 do not divide over context=3 ranks; use all_gather or p2p",
        ),
        (["parallel.pipeline=5"], 5, "parallel.pipeline=5: does not divide 36 layers"),
        (["rollout.tensor=2"], 3, "rollout.tensor=2: does not divide 3 ranks"),
    ],
)
def test_parallel_sizes_against_ranks_and_layers(make, overrides, world_size, expected):
    found = problems(make(*overrides), world_size)
    assert len(found) == 1 and expected in found[0]


def test_sizes_that_do_not_split_the_model(make):
    # 16 heads, hidden 2048, intermediate 11008 = 2**8 * 43, 2 key-value heads
    found = "\n".join(problems(make("parallel.tensor=3"), 3))
    for name in ("16 attention heads", "2048 hidden units", "11008 feed-forward columns", "2 KV heads"):
        assert name in found
    assert problems(make("parallel.tensor=16"), 16) == []
    found = problems(make("rollout.tensor=43"), 43)
    assert len(found) == 2 and all(line.startswith("rollout.tensor=43") for line in found)


def test_key_value_heads_that_neither_divide_nor_repeat(make, tmp_path):
    heads = {"num_key_value_heads": 6, "num_attention_heads": 48, "intermediate_size": 96}
    (tmp_path / "model/config.json").write_text(json.dumps(HF | heads))
    assert problems(make("rollout.tensor=3", "parallel.tensor=2"), 6) == []
    found = problems(make("rollout.tensor=4"), 4)
    assert len(found) == 1 and "6 KV heads" in found[0]


def test_the_language_model_may_be_nested(make, tmp_path):
    text = HF | {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    nested = {"model_type": "qwen2_5_vl", "text_config": text, "hidden_size": 7}
    (tmp_path / "model/config.json").write_text(json.dumps(nested))
    assert problems(make("parallel.tensor=2"), 2) == []


def test_model_files_that_are_no_language_model(make, tmp_path):
    for text, expected in (
        ("{", "is not readable"),
        ("[]", "is not a JSON object"),
        ("{}", "is it a language model?"),
    ):
        (tmp_path / "model/config.json").write_text(text)
        found = problems(make())
        assert len(found) == 1 and expected in found[0]


def test_longer_than_the_model_takes(make):
    found = problems(make("data.max_prompt_tokens=127000", "train.max_tokens_per_microbatch=200000"))
    assert len(found) == 1 and "may have 128024 tokens, the model takes 128000" in found[0]


def test_replay_trains_without_data_and_excludes_generation(make, tmp_path):
    replay = f"rollout.replay_from={tmp_path}"
    assert problems(make(replay, "data.train=")) == []
    assert len(problems(make(replay, "rollout.only=true", "rollout.save_to=x"))) == 2
    assert problems(make("rollout.only=true", "rollout.save_to=x", "rollout.num_samples=1")) == []


def test_sft_bounds_its_answers(make):
    assert problems(make("train.max_answer_tokens=12288", schema=SftConfig), job="sft") == []
    (budget,) = problems(make("train.max_answer_tokens=12289", schema=SftConfig), job="sft")
    assert "the longest sequence has 16385 tokens and must fit" in budget
    (none,) = problems(make("train.max_answer_tokens=0", schema=SftConfig), job="sft")
    assert none == "train.max_answer_tokens=0: out of range; it must be at least 1"
    (long,) = problems(
        make("train.max_answer_tokens=130000", "train.max_tokens_per_microbatch=140000", schema=SftConfig), job="sft"
    )
    assert long.startswith("data.max_prompt_tokens=4096: prompt + response may have 134096 tokens")


def test_the_recipe_of_either_job_can_be_cached(make, tmp_path):
    (tmp_path / "model/config.json").write_text(json.dumps(HF | {"vision_config": {}}))
    for schema in (RlConfig, SftConfig):
        assert problems(make(f"data.cache_dir={tmp_path}/cache", schema=schema), world_size=3, job="cache") == []
        (nothing,) = problems(make(schema=schema), job="cache")
        assert nothing.startswith("data.cache_dir=: there is nothing to fill")


def test_every_range_is_that_of_a_key():
    keys = {*keys_of(RlConfig), *keys_of(SftConfig)}
    assert {path for _, _, paths in _RANGES for path in paths.split()} <= keys


def test_numbers_alone_can_be_checked(make):
    assert problems(make("model.hf=none", "data.train=none"), require_files=False) == []
    assert len(problems(make("model.hf=none", "seed=-1"), require_files=False)) == 1


def test_a_wandb_login_is_seen(make, monkeypatch, tmp_path):
    cfg = make("log.wandb=online")
    (tmp_path / "netrc").write_text("machine example.org login a password b\n")
    assert len(problems(cfg)) == 1
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert problems(cfg) == []
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert problems(cfg) == []


def test_everything_wrong_is_said_at_once(make):
    cfg = make("seed=-1", "model.hf=none", "data.train=none", "rollout.tensor=3", "eval.every=5")
    assert len(problems(cfg, world_size=2)) == 5


def test_virtual_stages_need_three_real_ones_and_whole_layers(make):
    two, five = (problems(make(f"parallel.pipeline={p}", "parallel.virtual_pipeline=2"), world_size=p) for p in (2, 9))
    assert two[0].startswith("parallel.virtual_pipeline=2: needs a pipeline of more than 2 stages")
    assert problems(make("parallel.pipeline=3", "parallel.virtual_pipeline=6"), world_size=3) == []
    assert problems(make("parallel.pipeline=9", "parallel.virtual_pipeline=2"), world_size=9) == five == []
    (uneven,) = problems(make("parallel.pipeline=4", "parallel.virtual_pipeline=2"), world_size=4)
    assert "parallel.pipeline * virtual_pipeline=8: does not divide 36 layers" in uneven


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])  # older and newer transformers
def test_experts_are_shared_out_evenly(make, tmp_path, name):
    (problem,) = problems(make("parallel.expert=2"), world_size=2)
    assert problem.startswith("parallel.expert=2: the model has no experts")
    moe = {"model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts_per_tok": 2, name: 6}
    (tmp_path / "model/config.json").write_text(json.dumps(HF | moe))
    assert problems(make("parallel.expert=2"), world_size=4) == []
    ranks, experts, export = problems(make("parallel.expert=4", "checkpoint.export_hf=true"), world_size=2)
    assert ranks.startswith("parallel.expert=4: does not divide 2 ranks of a stage")
    assert experts.startswith("parallel.expert=4: does not divide 6 experts")
    assert export.startswith("checkpoint.export_hf=true: exporting experts is not built yet")


def test_the_models_own_table_is_asked(make, tmp_path):
    config = tmp_path / "model/config.json"
    assert problems(make("model.freeze=[embedding.*]")) == []
    (nothing,) = problems(make("model.freeze=[embeding.*]"))
    assert nothing.startswith("model.freeze=embeding.*: matches no parameter; names look like embedding.word")
    (everything,) = problems(make("model.freeze=['*']"))
    assert "nothing is left to train" in everything
    config.write_text(json.dumps(HF | {"rope_scaling": {"type": "yarn"}, "use_sliding_window": True}))
    assert [p.split(": ")[1] for p in problems(make())] == ["rope_type=yarn", "use_sliding_window=true"]
    config.write_text(json.dumps(HF | {"model_type": "bert"}))
    (unknown,) = problems(make())
    assert "no provider for model_type=bert" in unknown
    config.write_text(json.dumps(HF | {"vision_config": {"temporal_patch_size": 2}}))
    (frames,) = problems(make("data.num_frames=5"))
    assert frames.startswith("data.num_frames=5: the model joins 2 frames")
    (tmp_path / "format.jinja").write_text("{{ question }}")
    (template,) = problems(make(f"data.format_prompt={tmp_path}/format.jinja", "data.num_frames=4"))
    assert "uses the variables ['question']" in template


def test_the_lowest_temperature_is_that_of_the_engine(make):
    """vLLM would sample at 0.01 what the trainer scores at less (tests/dist/test_vllm_adaptations.py)."""
    assert problems(make("rollout.temperature=0.01")) == []
    (problem,) = problems(make("rollout.temperature=0.0099"))
    assert problem.startswith("rollout.temperature=0.0099: out of range")


def test_rollouts_alone_leave_nothing_to_export(make):
    (problem,) = problems(make("rollout.only=true", "rollout.save_to=rollouts", "checkpoint.export_hf=true"))
    assert problem.startswith("checkpoint.export_hf=true: rollout.only=true learns nothing to export")


def test_export_needs_a_last_checkpoint(make):
    (problem,) = problems(make("checkpoint.export_hf=true", "checkpoint.save_at_end=false"))
    assert problem.startswith("checkpoint.export_hf=true: exports the last checkpoint")


def test_a_fresh_start_beside_old_checkpoints_is_refused(make, tmp_path):
    (tmp_path / "run/checkpoints/step_90").mkdir(parents=True)
    assert problems(make(f"run_dir={tmp_path}/run")) == []
    (problem,) = problems(make(f"run_dir={tmp_path}/run", "checkpoint.resume=false"))
    assert "holds checkpoints of another run (step_90 ...)" in problem


def test_what_is_trained_is_not_cached(make, tmp_path):
    (tmp_path / "model/config.json").write_text(json.dumps(HF | {"vision_config": {}}))
    cache = f"data.cache_dir={tmp_path}/cache"
    assert problems(make(cache)) == problems(make("model.freeze_vision=false")) == []
    (trained,) = problems(make(cache, "model.freeze_vision=false", "model.train_vision=projector"))
    assert "what it would hold is trained by model.freeze_vision=false" in trained
    (tmp_path / "file").write_text("")
    (file,) = problems(make(f"data.cache_dir={tmp_path}/file"))
    assert file.endswith("is a file; give a folder")
    (nothing,) = problems(make(), job="cache")
    assert nothing.startswith("data.cache_dir=: there is nothing to fill")
    assert problems(make(cache, "parallel.tensor=2"), world_size=3, job="cache") == [], "any number of ranks can fill"


def test_only_a_tower_that_exists_is_trained(make, tmp_path):
    (missing,) = problems(make("model.freeze_vision=false"))
    assert missing.startswith("model.freeze_vision=false: the model has no vision tower")
    (tmp_path / "model/config.json").write_text(json.dumps(HF | {"vision_config": {}}))
    assert problems(make("model.freeze_vision=false", "model.freeze=['*']")) == [], "the tower alone is enough"


def test_a_model_of_text_keeps_and_blanks_nothing(make, tmp_path):
    found = problems(make(f"data.cache_dir={tmp_path}/cache", f"data.eval={tmp_path}/train.jsonl", "eval.blind=true"))
    assert [problem.partition("=")[0] for problem in found] == ["data.cache_dir", "eval.blind"]
    (tmp_path / "model/config.json").write_text(json.dumps(HF | {"vision_config": {}}))
    assert (
        problems(make(f"data.cache_dir={tmp_path}/cache", f"data.eval={tmp_path}/train.jsonl", "eval.blind=true")) == []
    )
