# SPDX-License-Identifier: Apache-2.0
"""I5: HF -> Megatron -> HF keeps every key and every bit; what the commands say and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.cli import main
from checkpoint_tools.digests import write_digests
from tests.world import run_world

SOURCES = ("plain", "tied", "tied_twice", "sharded", "other_names", "bfloat16")


def _run(*args: object) -> int:
    return main([str(arg) for arg in args])


def _verify_apart(folder: Path, *options: str) -> dict[str, Any]:
    """The report on folder/hf and folder/mcore, which must be the same.

    In a process of its own: worlds are forked from this one, and a process group would leave threads behind.
    """
    command = ("verify", "--hf", folder / "hf", "--mcore", folder / "mcore", "--json", folder / "report.json", *options)
    assert run_world(1, lambda _: _run(*command)) == [0]
    return json.loads((folder / "report.json").read_text())


def _read(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def _rewrite(source: Path, target: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A copy of a checkpoint folder with other tensors and other entries in config.json."""
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | config))
    return target


def _shard(source: Path, target: Path) -> Path:
    """The same checkpoint in two files, which cut through the layers."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = _read(source)
    files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return target


def _make_source(kind: str, plain: Path, tied: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of this kind, and the tensors that an export of it must hold."""
    tensors = _read(plain)
    if kind == "plain":
        return plain, tensors
    if kind == "sharded":
        return _shard(plain, folder), tensors
    if kind == "bfloat16":
        halved = {name: t.bfloat16() for name, t in tensors.items()}
        return _rewrite(plain, folder, halved, dtype="bfloat16"), halved
    if kind == "other_names":
        return _rewrite(plain, folder, {_other_name(name): t for name, t in tensors.items()}), tensors
    tensors = _read(tied)
    assert "lm_head.weight" not in tensors
    if kind == "tied":
        return tied, tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return _rewrite(tied, folder, tensors), tensors


def _other_name(name: str) -> str:
    """What transformers 5 calls the tensor in memory."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.fixture(scope="module")
def mcore(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as a Megatron checkpoint. Read only."""
    out = tmp_path_factory.mktemp("mcore") / "start"
    assert _run("hf-to-mcore", "--hf", tiny_checkpoint, "--out", out) == 0
    return out


@pytest.mark.parametrize("kind", SOURCES)
def test_round_trip_keeps_every_key_and_bit(
    kind: str, tiny_checkpoint: Path, tied_checkpoint: Path, tmp_path: Path
) -> None:
    source, expected = _make_source(kind, tiny_checkpoint, tied_checkpoint, tmp_path / "source")
    assert _run("hf-to-mcore", "--hf", source, "--out", tmp_path / "mcore") == 0
    assert _run("mcore-to-hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "hf") == 0
    exported = _read(tmp_path / "hf")
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor), name
    small = {p.name for p in source.iterdir()} - {p.name for p in source.glob("*.safetensors*")}
    for name in small:
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    report = _verify_apart(tmp_path, "--logits")
    assert report["same"] and report["num_tensors"] == len(expected) and report["opened_in"] == ["transformers"]
    assert 0 <= report["logprob_gap"] <= 1e-4


def test_export_in_bfloat16_and_in_several_files(
    mcore: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hf"
    options = ("--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", out, *options) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    source = _read(tiny_checkpoint)
    assert index["weight_map"].keys() == source.keys()
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in source.values())
    assert len(set(index["weight_map"].values())) > 3
    assert all((out / file).stat().st_size < 210_000 for file in index["weight_map"].values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], source[name].bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert _run("verify", "--hf", out, "--mcore", mcore) == 1
    assert "torch.bfloat16 in the Hugging Face folder, torch.float32 in the Meg" in capsys.readouterr().out


def test_verify_names_every_difference(
    mcore: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _read(tiny_checkpoint)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.5
    tensors["visual.merger.ln_q.weight"] = tensors["visual.merger.ln_q.weight"][:-1].clone()
    tensors["model.norm.weight"][0] = 0.0
    tensors["surplus"] = torch.zeros(2)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    changed = _rewrite(tiny_checkpoint, tmp_path / "changed", tensors)
    assert _run("verify", "--hf", changed, "--mcore", mcore, "--json", tmp_path / "report.json") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = {d["name"]: d["problem"] for d in report["differences"]}
    assert not report["same"] and report["opened_in"] == []
    assert found.keys() == {
        "model.layers.1.self_attn.k_proj.weight",
        "visual.merger.ln_q.weight",
        "model.norm.weight",
        "surplus",
        "model.layers.0.mlp.up_proj.weight",
    }
    assert found["model.layers.1.self_attn.k_proj.weight"] == "1 of 8192 elements differ, by up to 0.5"
    assert found["surplus"] == "only in the Hugging Face folder"
    assert found["model.layers.0.mlp.up_proj.weight"] == "only in the Megatron checkpoint"
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)


def test_verify_sees_a_flipped_sign_of_zero_and_takes_nan_as_equal(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _read(tiny_checkpoint)
    tensors["model.norm.weight"][:2] = torch.tensor([0.0, float("nan")])
    source = _rewrite(tiny_checkpoint, tmp_path / "source", tensors)
    assert _run("hf-to-mcore", "--hf", source, "--out", tmp_path / "mcore") == 0
    assert _run("verify", "--hf", source, "--mcore", tmp_path / "mcore", "--open-in", "none") == 0
    tensors["model.norm.weight"][0] = -0.0
    flipped = _rewrite(tiny_checkpoint, tmp_path / "flipped", tensors)
    assert _run("verify", "--hf", flipped, "--mcore", tmp_path / "mcore", "--open-in", "none") == 1
    assert "model.norm.weight: 1 of 128 elements differ, by up to 0\n" in capsys.readouterr().out


def test_missing_and_misshapen_tensors_are_listed_together(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _read(tiny_checkpoint)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(4, 4)
    broken = _rewrite(tiny_checkpoint, tmp_path / "broken", tensors)
    assert _run("hf-to-mcore", "--hf", broken, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "model.norm.weight: missing, expected shape [128]" in said
    assert "model.layers.1.mlp.down_proj.weight: shape [4, 4], expected [128, 256]" in said
    assert not (tmp_path / "out").exists()


def test_a_megatron_checkpoint_that_does_not_fit_its_config(
    mcore: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mcore"
    shutil.copytree(mcore, folder)
    config = json.loads((folder / "hf" / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "intermediate_size": 384}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    write_digests(folder, {})
    assert _run("mcore-to-hf", "--mcore", folder, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "decoder.layers.mlp.linear_fc1.weight[2]: missing, expected shape [768, 128]" in said
    assert "decoder.layers.mlp.linear_fc1.weight[0]: shape [512, 128], expected [768, 128]" in said
    assert _run("verify", "--hf", tiny_checkpoint, "--mcore", folder) == 1


def test_mixed_dtypes_cannot_be_fused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _read(tiny_checkpoint)
    tensors["model.layers.1.mlp.gate_proj.weight"] = tensors["model.layers.1.mlp.gate_proj.weight"].half()
    mixed = _rewrite(tiny_checkpoint, tmp_path / "mixed", tensors)
    assert _run("hf-to-mcore", "--hf", mixed, "--out", tmp_path / "out") == 2
    assert "decoder.layers.mlp.linear_fc1.weight: torch.float16, torch.float32" in capsys.readouterr().err


def test_a_tied_copy_that_differs_is_refused(
    tied_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _read(tied_checkpoint)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    source = _rewrite(tied_checkpoint, tmp_path / "source", tensors)
    assert _run("hf-to-mcore", "--hf", source, "--out", tmp_path / "out") == 2
    assert "(model.safetensors) differs from model.embed_tokens.weight; set tie" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (("--tp", 3), "--tp=3: does not divide 4 attention heads"),
        (("--pp", 3), "--pp=3: does not divide 2 layers"),
        (("--tp", 0), "--tp=0: must be at least 1"),
    ],
)
def test_layouts_that_do_not_fit(
    sizes: tuple[object, ...],
    reason: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run("hf-to-mcore", "--hf", tiny_checkpoint, "--out", tmp_path / "out", *sizes) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert _run("hf-to-mcore", "--hf", tiny_checkpoint, "--out", tmp_path / "out", "--tp", 4, "--pp", 2) == 0


def test_what_is_in_the_way_stays(mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", out, "--force") == 2
    assert "--force replaces checkpoints only" in capsys.readouterr().err
    assert (out / "letter.txt").read_text() == "dear"
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", mcore, "--force") == 2
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", mcore.parent, "--force") == 2
    assert (mcore / "metadata.json").is_file()


def test_force_replaces_a_checkpoint(mcore: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", out) == 0
    (out / "old.safetensors").write_bytes(b"")
    assert _run("mcore-to-hf", "--mcore", mcore, "--out", out, "--force") == 0
    assert not (out / "old.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unreadable_input(
    mcore: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("mcore-to-hf", "--mcore", tmp_path, "--out", tmp_path / "out") == 2
    assert "holds no Megatron checkpoint" in capsys.readouterr().err
    assert _run("verify", "--hf", tmp_path, "--mcore", mcore) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert _run("inspect", tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err
    assert _run("verify", "--hf", tiny_checkpoint, "--mcore", mcore, "--open-in", "pickle") == 2
    assert "--open-in=pickle: unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        _run("mcore-to-hf", "--mcore", mcore)
    assert stopped.value.code == 2


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_an_error_and_leaves_nothing(
    victim: str, mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mcore"
    shutil.copytree(mcore, folder)
    content = (folder / victim).read_bytes()
    (folder / victim).write_bytes(content[: len(content) // 2])
    assert _run("mcore-to-hf", "--mcore", folder, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["mcore"]


def test_the_newest_complete_step_is_taken(mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("step_2", "step_10", "step_30.partial"):
        shutil.copytree(mcore, tmp_path / step)
    (tmp_path / "step_11").mkdir()
    (tmp_path / "step_10" / "state.json").write_text('{"step": 10}')
    assert _run("inspect", tmp_path, "--json", tmp_path / "summary.json") == 0
    assert "step_10: Megatron checkpoint, step 10, weights only" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 10


def test_inspect_counts_what_is_there(
    mcore: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _read(tiny_checkpoint)
    summaries = []
    for folder in (tiny_checkpoint, mcore):
        assert _run("inspect", folder, "--json", tmp_path / "summary.json") == 0
        summaries.append(json.loads((tmp_path / "summary.json").read_text()))
    for summary in summaries:
        assert summary["model_type"] == "qwen2_5_vl" and not summary["optimizer"]
        assert summary["num_parameters"] == sum(t.numel() for t in source.values())
    hf, megatron = ({g["name"]: g for g in summary["groups"]} for summary in summaries)
    assert hf["model.layers.*.mlp.up_proj.weight"] == {
        "name": "model.layers.*.mlp.up_proj.weight",
        "count": 2,
        "shape": [256, 128],
        "dtype": "float32",
    }
    assert megatron["decoder.layers.mlp.linear_fc1.weight"]["shape"] == [2, 512, 128]
    assert "decoder.layers.self_attention.linear_qkv.weight" in capsys.readouterr().out


@pytest.mark.full
def test_vllm_generates_from_an_exported_folder_what_transformers_does(
    heavy_imports: None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert _run("hf-to-mcore", "--hf", tiny_checkpoint, "--out", tmp_path / "mcore") == 0
    assert _run("mcore-to-hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "hf") == 0
    report = _verify_apart(tmp_path, "--open-in", "transformers,vllm")
    assert report["opened_in"] == ["transformers", "vllm"]


@pytest.mark.full
def test_vllm_is_heard_when_it_disagrees(heavy_imports: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The check compares with transformers' tokens, so weights that only vLLM misreads would be found."""
    from checkpoint_tools import readers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpoint_tools.vllm_check.generate_greedily", lambda *_: [1] * readers.NUM_GENERATED)
        (problem,) = readers.problems_in_vllm(tiny_checkpoint, "hello")
    assert problem.startswith("vLLM generates [1, 1,")
