# SPDX-License-Identifier: Apache-2.0
"""Damaged and ill-fitting Hugging Face folders: refused by jobs and tools alike, before anything is loaded, in a line
that names folder, file, tensor and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.cli import main
from megatron_rl.config.checks import check
from megatron_rl.config.schema import CheckpointConfig, DataConfig, LogConfig, ModelConfig, SftConfig, SftTrainConfig
from model_providers.hf_checkpoint import HfCheckpoint
from model_providers.hf_files import tokenizer_problems
from tests import tiny_policy as tp
from tests.world import run_world

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def _problems(folder: Path) -> list[str]:
    """What a job says about the folder before it starts."""
    cfg = SftConfig(
        run_dir=str(folder.parent / "run"),
        model=ModelConfig(hf=str(folder)),
        data=DataConfig(train=str(folder / "config.json"), num_frames=4, max_prompt_tokens=64),
        train=SftTrainConfig(num_steps=1, max_answer_tokens=4, max_tokens_per_microbatch=512),
        checkpoint=CheckpointConfig(),
        log=LogConfig(wandb="off", tensorboard=False),
    )
    try:
        check(cfg, 1, "sft")
    except ValueError as error:
        return [line.strip() for line in str(error).splitlines()[1:] if "data.train" not in line]
    return []


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder: Path) -> Path:
    """In two files."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _said_by_tool(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["hf-to-mcore", "--hf", str(folder), "--out", str(folder.parent / "out")]) == 2
    assert not (folder.parent / "out").exists()
    return capsys.readouterr().err


def test_whole_folders_pass(folder: Path, tied_checkpoint: Path) -> None:
    assert _problems(folder) == []
    assert not [problem for problem in _problems(tied_checkpoint) if "model.hf" in problem]
    _rewrite(
        folder, lambda tensors: {f"model.language_{n}" if n.startswith("model.") else n: t for n, t in tensors.items()}
    )
    assert _problems(folder) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda whole: whole[: len(whole) * 2 // 3], "is cut: {cut:,} of {size:,} bytes are there; download it again"),
        (lambda whole: whole[:100], "is cut or damaged (JSONDecodeError); download it again"),
        (lambda whole: b"", "is empty; download it again"),
        (lambda whole: LFS_POINTER, "is a pointer of Git LFS and not the file (run `git lfs pull`); download it again"),
        (lambda whole: whole + b"\0" * 8, "has {cut:,} bytes, its header describes {size:,}; download it again"),
        (lambda whole: b"\xff" * 8 + whole[8:], "is cut or damaged (JSONDecodeError); download it again"),
    ],
    ids=["cut", "header cut", "empty", "LFS pointer", "too long", "header of 2^64 bytes"],
)
def test_a_damaged_shard_is_named(
    content: Callable[[bytes], bytes], why: str, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(content(whole))
    why = why.format(cut=len(content(whole)), size=len(whole))
    assert _problems(sharded) == [f"model.hf={sharded}: {shard.name} {why}"]
    assert _said_by_tool(sharded, capsys) == f"hf-to-mcore: {sharded}: {shard.name} {why}\n"
    assert main(["inspect", str(sharded)]) == 2
    assert f"{sharded}: {shard.name} {why}" in capsys.readouterr().err


def test_an_index_that_names_the_wrong_shard(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = index["weight_map"]["lm_head.weight"]
    wrong = next(file for file in index["weight_map"].values() if file != right)
    index["weight_map"]["lm_head.weight"] = wrong
    path.write_text(json.dumps(index))
    said = (
        f"{sharded}: {path.name} says that lm_head.weight is in {wrong}, but it is in {right}; download the index again"
    )
    assert _problems(sharded) == [f"model.hf={said}"]
    assert _said_by_tool(sharded, capsys) == f"hf-to-mcore: {said}\n"
    path.write_bytes(LFS_POINTER)
    assert f"{path.name} is a pointer of Git LFS" in _problems(sharded)[0]


@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model.", "module."])
def test_names_behind_a_prefix_are_one_line(prefix: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rewrite(folder, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    (problem,) = _problems(folder)
    assert problem.startswith(f"model.hf={folder}: the names in its files begin with '{prefix}' ({prefix}")
    assert ("merge the adapter" in problem) == (prefix == "base_model.model.")
    assert f"begin with '{prefix}'" in _said_by_tool(folder, capsys)


def test_another_model_is_told_by_a_few_names(folder: Path) -> None:
    _rewrite(folder, lambda tensors: {f"transformer.{i}.w": tensor for i, tensor in enumerate(tensors.values())})
    found = _problems(folder)
    assert len(found) == 21 and all("missing, expected shape" in problem for problem in found[:-1])
    assert found[-1].endswith("its files hold transformer.0.w, transformer.1.w, transformer.10.w ...")


def test_a_tied_head_that_differs_stops_a_job(tied_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tied_checkpoint, folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _rewrite(folder, lambda tensors: tensors | {"lm_head.weight": table.clone()})
    assert not [problem for problem in _problems(folder) if "tie" in problem], "an equal copy is taken"
    other = table.clone()
    other[-1, -1] += 1
    _rewrite(folder, lambda tensors: tensors | {"lm_head.weight": other})
    (problem,) = [problem for problem in _problems(folder) if "tie" in problem]
    assert problem.startswith(
        f"model.hf={folder}: config.json ties the embeddings, but lm_head.weight (model.safetensors)"
    )
    assert problem.endswith("set tie_word_embeddings to false, or delete lm_head.weight")


def test_tokens_beyond_the_table_are_refused(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    fill = [f"<fill{i}>" for i in range(size - len(tokenizer))]
    tokenizer.add_tokens(fill)
    tokenizer.save_pretrained(folder)
    assert _problems(folder) == [], "the last row of the table is one"
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    assert _problems(folder) == [
        f"model.hf={folder}: the tokenizer has ids up to {size + 1} ('<think>' is {size}, '</think>' is {size + 1}), "
        f"config.json a vocabulary of {size}; resize the embeddings of the model, or remove the added tokens"
    ]


def test_other_kinds_of_tokenizers(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0], ["c", -2.0]]}, "added_tokens": []}))
    assert list(tokenizer_problems(folder, 3)) == []
    assert "'c' is 2" in next(tokenizer_problems(folder, 2))
    path.unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 9}))
    (folder / "merges.txt").write_text("")
    assert list(tokenizer_problems(folder, 10)) == []
    assert "'b' is 9" in next(tokenizer_problems(folder, 9))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no tokenizer.json; copy the tokenizer's files of the model into it"),
        (b'{"model": {', "tokenizer.json is cut or damaged (JSONDecodeError); download it again"),
        (b"[]", "tokenizer.json is cut or damaged (TypeError); download it again"),
        (
            LFS_POINTER,
            "tokenizer.json is a pointer of Git LFS and not the file (run `git lfs pull`); download it again",
        ),
    ],
    ids=["missing", "cut", "no object", "LFS pointer"],
)
def test_a_tokenizer_that_is_not_there(content: bytes | None, why: str, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert _problems(folder) == [f"model.hf={folder}: {why}"]


def _load(folder: Path) -> str:
    mesh = tp.join(tensor=2)
    try:
        tp.open_trainer(folder, mesh)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_weights_that_are_not_finite_stop_every_rank(folder: Path) -> None:
    """One element, which one rank of two reads."""

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][-1, 3] = float("nan")
        return tensors

    _rewrite(folder, spoil)
    (said,) = set(run_world(2, lambda _: _load(folder)))
    assert said.startswith(f"{folder}: model.layers.1.mlp.up_proj.weight (model.safetensors): NaN or infinity among")


def test_a_tower_that_is_not_finite(folder: Path) -> None:
    checkpoint = HfCheckpoint(folder)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names() if name.startswith("visual.")}
    checkpoint.check_finite(tensors)
    tensors["visual.merger.ln_q.weight"] = torch.tensor([1.0, float("inf")])
    with pytest.raises(ValueError, match=r"visual.merger.ln_q.weight \(model.safetensors\): NaN or infinity"):
        checkpoint.check_finite(tensors)
