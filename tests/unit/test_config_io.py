# SPDX-License-Identifier: Apache-2.0
"""Recipes: strict keys and types, overrides, one message for all problems, and a help text that knows every key."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from megatron_rl.config.command_line import describe, parse_args
from megatron_rl.config.io import PATHS, dump_config, join, keys_of, load_config, sections_of
from megatron_rl.config.schema import CacheConfig, RlConfig, SftConfig

MINIMAL = "run_dir: runs/a\nmodel: {hf: some/model}\ntrain: {num_steps: 3}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"

    def write(text: str = MINIMAL) -> str:
        path.write_text(text)
        return str(path)

    return write


def problems_of(recipe: str, *overrides: str, schema: type[CacheConfig] = RlConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, schema, overrides)
    return str(caught.value)


def test_defaults_fill_what_the_recipe_leaves_out(recipe):
    cfg = load_config(recipe(), RlConfig)
    assert (cfg.run_dir, cfg.model.hf, cfg.train.num_steps) == ("runs/a", "some/model", 3)
    assert cfg.rollout.num_samples == 8
    assert cfg.max_model_len == 4096 + 1024


def test_overrides_win_in_order(recipe):
    cfg = load_config(recipe(), RlConfig, ["seed=2", "train.optimizer.lr=2e-6", "data.eval=", "seed=5"])
    assert cfg.seed == 5
    assert cfg.train.optimizer.lr == 2e-6
    assert cfg.data.eval == ""


@pytest.mark.parametrize("text", ["1e-6", "1.0e-06", "0.000001", "'1e-6'"])
def test_every_way_to_write_a_small_number(recipe, text):
    assert load_config(recipe(), RlConfig, [f"train.optimizer.lr={text}"]).train.optimizer.lr == 1e-6


def test_off_is_a_word_not_false(recipe):
    assert load_config(recipe(MINIMAL + "log: {wandb: off}\n"), RlConfig).log.wandb == "off"


def test_int_for_float_and_list_for_pair(recipe):
    cfg = load_config(
        recipe(), RlConfig, ["rollout.temperature=1", "train.optimizer.betas=[0.9, 1]", "model.freeze=[a.*, b]"]
    )
    assert cfg.model.freeze == ("a.*", "b")
    assert isinstance(cfg.rollout.temperature, float)
    assert cfg.train.optimizer.betas == (0.9, 1.0)


def test_empty_section_is_all_defaults(recipe):
    assert load_config(recipe(MINIMAL + "data:\n"), RlConfig).data.num_frames == 32


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.num_frame=8", "data.num_frame=8: no such key; did you mean 'num_frames'?"),
        ("num_frames=8", "num_frames=8: no such key; did you mean 'data.num_frames'?"),
        ("zzz=8", "zzz=8: no such key; known here: run_dir, device, max_phase_minutes, model"),
        ("seed=true", "seed=true: true/false; expected integer"),
        ("seed=010", "seed=010: text; expected integer"),
        ("seed=1.5", "seed=1.5: a number; expected integer"),
        ("seed=null", "seed=: empty; expected integer"),
        ("data.shuffle=1", "data.shuffle=1: an integer; expected true | false"),
        ("data.fps=.inf", "data.fps=.inf: text; expected number"),
        ("rollout.temperature=nan", "rollout.temperature=nan: text; expected number"),
        ("log.wandb=never", "log.wandb=never: not a choice; expected off | offline | online"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas=[0.9]: a list; expected [number, number]"),
        ("model.freeze=[1]", "model.freeze[0]=1: an integer; expected text"),
        ("model.freeze=x", "model.freeze=x: text; expected [text, ...]"),
        ("train.optimizer.betas=[0.9, x]", "train.optimizer.betas[1]=x: text; expected number"),
        ("data=x", "data=x: is a section"),
        ("data={fps: 1}", "write data.<key>=value"),
        ("seed.a=1", "seed.a=1: 'seed' is a value, not a section"),
        ("model.freeze=[", "the value is not readable as YAML"),
        ("data.train", "data.train: not an override; write key.path=value"),
    ],
)
def test_what_is_wrong_and_what_to_do(recipe, override, expected):
    text = MINIMAL + "seed: 1\n"
    message = problems_of(recipe(text), override)
    assert expected in message
    assert "1 problem" in message


def test_all_problems_in_one_message(recipe):
    message = problems_of(recipe("data: {num_frame: 8, shuffle: 1}\n"), "seed=x")
    assert "6 problems" in message
    missing = [f"{key}: missing" for key in ("run_dir", "model.hf", "train.num_steps")]
    for part in (*missing, "num_frame=8", "shuffle=1", "seed=x"):
        assert part in message


def test_files_that_are_no_recipe(recipe, tmp_path):
    assert "no such file; check the path" in problems_of(str(tmp_path / "none.yaml"))
    assert "the first argument is the recipe" in problems_of("seed=1")
    assert "holds a list" in problems_of(recipe("- a\n"))
    assert "holds empty" in problems_of(recipe(""))
    assert "not readable as YAML" in problems_of(recipe("a: [\n"))
    assert "key 'seed' appears twice" in problems_of(recipe(MINIMAL + "seed: 1\nseed: 2\n"))


@pytest.mark.parametrize(
    "name", ["off", "1e-6", "12", "true", "null", "2024-01-01", "", "a: b", "ü #x", "[x]", "010", "1:30"]
)
def test_a_dump_loads_back_equal(recipe, name):
    base = load_config(recipe(), RlConfig, ["train.optimizer.lr=1e-6", "data.fps=0.1", "log.wandb=off"])
    cfg = dataclasses.replace(base, run_dir=name)
    assert load_config(recipe(dump_config(cfg)), RlConfig) == cfg


@pytest.mark.parametrize(
    "value",
    ["/data/a b #1", "two\nlines", "7", "yes", "null", "[", "a: b", "it's", '"a" or "b"', " x", "#", "{fps: 1}"],
)
def test_a_text_on_the_command_line_is_taken_as_it_is(recipe, value):
    """YAML would cut it at ` #`: the run would go to another folder, and resume what is there."""
    overrides = [f"run_dir={value}", f"log.project={value}", f"reward.name={value}"]
    cfg = load_config(recipe(), RlConfig, overrides)
    assert cfg.run_dir == cfg.log.project == cfg.reward.name == value


def test_quotes_around_a_whole_text_are_not_part_of_it(recipe):
    cfg = load_config(recipe(), RlConfig, ["run_dir='a #1'", 'data.media_root="a\\tb"', "data.eval=''"])
    assert (cfg.run_dir, cfg.data.media_root, cfg.data.eval) == ("a #1", "a\tb", "")


def test_a_tilde_is_the_home_folder_in_every_path(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    no_paths = {"log.project", "checkpoint.best_metric"}
    for job in (RlConfig, SftConfig):
        hints = {path: typing.get_type_hints(section) for path, section in sections_of(job)}
        texts = {join(path, name) for path, hint in hints.items() for name, kind in hint.items() if kind is str}
        texts = {path for path in texts if not path.startswith("data.columns.")}
        assert texts - no_paths == PATHS & set(keys_of(job)), "a new text field: is it a path?"
    cfg = load_config(recipe(), RlConfig, [f"{path}=~/x" for path in PATHS])
    assert cfg.run_dir == cfg.model.hf == cfg.data.cache_dir == cfg.reward.name == "/home/me/x"
    assert load_config(recipe(), RlConfig, ["data.train=~/a, ~/b@test,c/~d"]).data.train == (
        "/home/me/a, /home/me/b@test,c/~d"
    )
    assert load_config(recipe(MINIMAL.replace("run_dir: ", "run_dir: ~/")), RlConfig).run_dir.startswith("/home/me/")
    message = problems_of(recipe(), "run_dir=~nobody-here/x")
    assert "run_dir=~nobody-here/x: there is no home folder of that name; write ./~nobody-here/x" in message


def test_a_mapping_is_set_whole_or_key_by_key(recipe):
    text = recipe(MINIMAL + "reward: {terms: {accuracy: 0.9, format: 0.1}}\n")
    assert load_config(text, RlConfig).reward.terms == {"accuracy": 0.9, "format": 0.1}
    assert load_config(text, RlConfig, ["reward.terms.format=0.2"]).reward.terms == {"accuracy": 0.9, "format": 0.2}
    assert load_config(text, RlConfig, ["reward.terms={accuracy: 1}"]).reward.terms == {"accuracy": 1.0}
    assert load_config(text, RlConfig, ["reward.terms={}"]).reward.terms == {}
    cfg = load_config(text, RlConfig, ["reward.terms.length=-1e-3"])
    assert load_config(recipe(dump_config(cfg)), RlConfig) == cfg
    assert "reward.terms.format=x: text; expected number" in problems_of(recipe(), "reward.terms.format=x")
    assert "reward.terms=0.2: a number; expected {text: number}" in problems_of(recipe(), "reward.terms=0.2")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "reward.format_weight=0.2",
            "reward.format_weight=0.2: is not a key any more; write reward.terms: {accuracy: 0.8, format: 0.2}",
        ),
        (
            "reward.format_weight=0.1",
            "leave it out for the default, reward.terms: {accuracy: 0.9, format: 0.1}",
        ),
        ("train.max_answer_tokens=8", "train.max_answer_tokens=8: is a key of SFT; RL has rollout.max_response_tokens"),
    ],
)
def test_what_to_write_instead_of_a_key_that_moved(recipe, override, expected):
    message = problems_of(recipe(), override)
    assert expected in message and "1 problem" in message


def test_the_terms_that_replace_format_weight_are_accepted_as_they_stand(recipe):
    message = problems_of(recipe(), "reward.format_weight=0.25")
    terms = message[message.index("{") : message.index("}") + 1]
    assert load_config(recipe(), RlConfig, [f"reward.terms={terms}"]).reward.terms == {"accuracy": 0.75, "format": 0.25}


def test_sft_has_no_rollouts(recipe):
    cfg = load_config(recipe(MINIMAL), SftConfig, ["train.max_answer_tokens=2048"])
    assert cfg.max_model_len == 4096 + 2048
    assert load_config(recipe(dump_config(cfg)), SftConfig) == cfg
    message = problems_of(
        recipe(MINIMAL + "rollout: {max_response_tokens: 2048, tensor: 2}\neval:\n"),
        "algorithm.loss_average=sequence",
        schema=SftConfig,
    )
    assert "4 problems" in message
    for line in (
        "rollout.max_response_tokens=2048: SFT has no rollouts; use train.max_answer_tokens",
        "rollout.tensor=2: SFT has no rollouts; remove it",
        "algorithm.loss_average=sequence: SFT has no advantages and no policy loss; use train.loss_average",
        "eval=: SFT generates no answers to evaluate; remove it",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("", RlConfig),
        ("rollout: {tensor: 2}\n", RlConfig),
        ("train: {num_steps: 3, max_answer_tokens: 8}\n", SftConfig),
    ],
)
def test_the_cache_is_filled_for_the_recipe_that_will_run(recipe, text, schema):
    minimal = MINIMAL.replace("train: {num_steps: 3}\n", "") if text.startswith("train") else MINIMAL
    cfg = load_config(recipe(minimal + text), CacheConfig)
    assert type(cfg) is schema and cfg == load_config(recipe(minimal + text), schema)


def test_a_recipe_that_could_not_run_fills_no_cache(recipe):
    message = problems_of(recipe(MINIMAL + "rollout: {tensors: 2}\n"), schema=CacheConfig)
    assert "rollout.tensors=2: no such key; did you mean 'tensor'?" in message
    both = MINIMAL.replace("num_steps: 3", "num_steps: 3, max_answer_tokens: 8") + "rollout: {tensor: 2}\n"
    assert "SFT has no rollouts" in problems_of(recipe(both), schema=CacheConfig)


def test_help_names_every_key_and_its_doc():
    text = describe(RlConfig)
    for section in dataclasses.fields(RlConfig):
        assert section.name in text
    assert "advantage" in text and "grpo | dr_grpo | rloo; default grpo" in text
    assert "Response" in text and "Folder of this run" in text
    assert "Weights of the reward's named parts" in text and "{text: number}; default {}" in text
    assert "train.optimizer:" in text and "[number, number]; default [0.9, 0.999]" in text


@pytest.mark.parametrize("schema", [RlConfig, SftConfig, CacheConfig])
def test_help_explains_every_key(schema):
    lines = [line for line in describe(schema).splitlines() if line]
    is_key = [line.startswith("  ") and not line.startswith("   ") for line in lines]
    unexplained = [a for a, b, key in zip(lines, [*lines[1:], ""], is_key, strict=True) if key and b[:6] != " " * 6]
    assert sum(is_key) > 25 and unexplained == []


@pytest.mark.parametrize("schema", [RlConfig, SftConfig, CacheConfig])
def test_help_lists_the_keys_of_its_own_job(schema):
    listed = set()
    for line in describe(schema).splitlines():
        if not line.startswith(" ") and line:
            section = "" if line == "top level:" else line.removesuffix(":") + "."
        elif line.startswith("  ") and not line.startswith("   "):
            listed.add(section + line.split()[0])
    keys = keys_of(schema)
    assert listed == {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert ("rollout.tensor" in listed) == ("reward.terms" in listed) == (schema is RlConfig)
    assert ("train.max_answer_tokens" in listed) == (schema is SftConfig)
    assert ("train.num_steps" in listed) == (schema is not CacheConfig)


def test_help_exits_clean_and_shows_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], RlConfig, "python -m megatron_rl.train", "Train a policy.")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: python -m megatron_rl.train" in out and "max_tokens_per_microbatch" in out


def test_parse_args_reads_recipe_and_overrides(recipe):
    cfg, only_check, _ = parse_args([recipe(), "seed=9"], RlConfig, "x", "y")
    assert cfg.seed == 9 and not only_check
    cfg, only_check, _ = parse_args([recipe(), "--check", "seed=9"], RlConfig, "x", "y")
    assert cfg.seed == 9 and only_check
