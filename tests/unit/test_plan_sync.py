# SPDX-License-Identifier: Apache-2.0
"""The planner's numbers against hand-computed ones for published models, its messages, and how fast it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.weight_sync.command_line import main
from model_providers.known import KNOWN_CONFIGS

REPO = Path(__file__).parents[2]


def planned(tmp_path: Path, train: str, rollout: str, *more: str, model: str = "Qwen2.5-7B") -> dict[str, Any]:
    path = tmp_path / "plan.json"
    assert main(["--train", train, "--rollout", rollout, "--model", model, "--json", str(path), *more]) == 0
    return json.loads(path.read_text())


def received(ranks: list[dict[str, int]]) -> tuple[float, float]:
    """Average and maximum in GB."""
    values = [rank["received"] / 1e9 for rank in ranks]
    return round(sum(values) / len(values), 2), round(max(values), 2)


# Qwen2.5-7B has 7.6156e9 parameters = 15.23 GB in bfloat16: 1/8 of it is 1.904, a half 7.616, and so on.
TABLE = [
    ("tp=4,pp=2", "tp=2", (6.66, 7.62), (5.71, 5.71), 13.33),
    ("tp=4,pp=2", "tp=1", (13.33, 13.33), (13.33, 13.33), 13.33),
    ("tp=4,pp=2", "tp=4", (1.90, 1.90), (1.90, 1.90), 13.33),
    ("tp=2,pp=2", "tp=2", (3.81, 3.81), (3.81, 3.81), 11.42),
    ("tp=2", "tp=2", (0, 0), (0, 0), 7.62),
    ("tp=4", "tp=4", (0, 0), (0, 0), 11.42),
]


@pytest.mark.parametrize(("train", "rollout", "usual", "permuted", "full_gather"), TABLE)
def test_qwen_7b(tmp_path, train, rollout, usual, permuted, full_gather) -> None:
    plan = planned(tmp_path, train, rollout, "--gpus", "8")
    assert received(plan["ranks"]) == usual
    assert received(plan["permuted"]) == permuted
    assert round(plan["full_gather_received"] / 1e9, 2) == full_gather
    assert round(plan["minimum"] / 1e9, 2) == usual[0]


def test_ratios_to_the_full_gather(tmp_path) -> None:
    plan = planned(tmp_path, "tp=4,pp=2", "tp=2")
    assert plan["full_gather_received"] / plan["minimum"] == pytest.approx(2.00, abs=0.005)
    permuted = sum(rank["received"] for rank in plan["permuted"]) / 8
    assert plan["full_gather_received"] / permuted == pytest.approx(2.33, abs=0.005)
    plan = planned(tmp_path, "tp=2,pp=2", "tp=2", "--gpus", "4")
    assert plan["full_gather_received"] / plan["minimum"] == pytest.approx(3.00, abs=0.005)


def test_json(tmp_path) -> None:
    plan = planned(tmp_path, "tp=4,pp=2", "tp=2", "--nvlink", "100")
    assert set(plan) == {
        *("ranks", "full_gather_received", "minimum", "rank_permutation", "permuted"),
        *("predicted_seconds", "model", "train", "rollout", "gpus"),
    }
    assert (plan["model"], plan["train"], plan["rollout"], plan["gpus"]) == ("Qwen2.5-7B", "tp=4,pp=2", "tp=2", 8)
    assert plan["rank_permutation"] == [0, 2, 1, 3, 4, 6, 5, 7]
    for ranks in (plan["ranks"], plan["permuted"]):
        assert [row["rank"] for row in ranks] == list(range(8))
        assert all(row["need"] == row["local"] + row["received"] for row in ranks)
        assert sum(row["sent"] for row in ranks) == sum(row["received"] for row in ranks)
    assert plan["minimum"] == sum(row["received"] for row in plan["ranks"]) / 8
    most = max(max(row["received"], row["sent"]) for row in plan["ranks"])
    assert plan["predicted_seconds"]["usual"] == pytest.approx(most / 100e9)


def test_bytes_across_nodes_take_the_network(tmp_path) -> None:
    # Two nodes of one GPU: each lacks half the layers, 2 * 6.5e9 / 2 bytes, and one of embedding and head.
    plan = planned(tmp_path, "pp=2", "tp=1", "--gpus", "2", "--gpus-per-node", "1", "--network", "10")
    most = max(row["received"] for row in plan["ranks"])
    assert plan["predicted_seconds"]["usual"] == pytest.approx(most / 10e9)


def test_float32_doubles_the_bytes(tmp_path) -> None:
    half, whole = (planned(tmp_path, "tp=2,pp=2", "tp=2", "--dtype", d) for d in ("bfloat16", "float32"))
    assert whole["minimum"] == 2 * half["minimum"]


def test_tied_embedding_with_two_kv_heads_counts_once(tmp_path) -> None:
    # 3.0859e9 parameters in Qwen2.5-VL-3B's language model; K and V of 2 heads are held twice at engine TP 4.
    plan = planned(tmp_path, "tp=2", "tp=4", model="Qwen2.5-VL-3B")
    total = 36 * (2 * 2048 * 2048 + 3 * 2048 * 11008 + 2 * 256 * 2048 + 2048 + 512 + 2 * 2048) + 151936 * 2048 + 2048
    kv = 36 * 2 * 256 * (2048 + 1)
    replicated = (36 * 2 + 1) * 2048
    need = (total - kv - replicated) / 4 + kv / 2 + replicated
    assert sum(row["need"] for row in plan["ranks"]) == 8 * 2 * need
    assert plan["full_gather_received"] == (total - replicated) / 2 * 2


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_known_models_have_the_parameters_of_their_name(tmp_path, name: str) -> None:
    plan = planned(tmp_path, "tp=1", "tp=1", model=name)
    billions = float(name.rsplit("-", 1)[1].removesuffix("B"))
    assert plan["ranks"][0]["need"] / 2e9 == pytest.approx(billions, rel=0.09)


def test_config_file_or_folder(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["Qwen2.5-7B"]))
    for path in (tmp_path, tmp_path / "config.json"):
        assert planned(tmp_path, "tp=4,pp=2", "tp=2", model=str(path))["minimum"] == pytest.approx(6.66e9, rel=1e-3)


def test_the_report(capsys) -> None:
    main(["--train", "tp=4,pp=2", "--rollout", "tp=2", "--model", "Qwen2.5-7B"])
    text = " ".join(capsys.readouterr().out.split())
    assert "│ 0 3-4 7 │ 4 │ 7.62 │ 1.90 │ 5.71 │ 5.71 │" in text
    assert "6.66 GB on average, 7.62 at most" in text and "13.33 GB per GPU: 2.00x less" in text
    assert "(0 2 | 1 3 | 4 6 | 5 7)" in text and "13.33 GB per GPU: 2.33x less" in text


HF_NAME = "model.layers.3.self_attn.k_proj.weight"


def test_explain_by_any_of_the_three_names(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    of_engine, of_mcore = (
        "model.layers.3.self_attn.qkv_proj.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
    )
    arguments = ["--train", "tp=4,pp=2", "--rollout", "tp=2", "--model", "Qwen2.5-7B", "--explain"]
    for name in (HF_NAME, of_engine, of_mcore):
        assert main([*arguments, name]) == 0
        rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "k_proj" in line]
        # Layer 3 is on ranks 0-3; each holds one of 4 KV heads of 128 rows. Shard 0 is wanted by the even ranks.
        assert rows[0] == f"│ {HF_NAME} │ 0-127 │ 0-3583 │ 0 │ 0 -> 2 4 6 │"
        assert rows[1] == f"│ {HF_NAME} │ 128-255 │ 0-3583 │ │ 1 -> 0 2 4 6 │"
        assert rows[3] == f"│ {HF_NAME} │ 384-511 │ 0-3583 │ 3 │ 3 -> 1 5 7 │"
        assert len(rows) == 4


MISTAKES = [
    (("tp=3,pp=5,vp=2", "tp=7", "Qwen2.5-7B"), ["pp*vp=10: does not divide 28 layers", "tp=3: does not divide 28 att"]),
    (
        ("tp=3", "tp=7", "Qwen2.5-7B"),
        [
            "--rollout tp=7: neither divides nor is a multiple of 4 KV heads",
            "tp=7: does not divide 18944 feed-forward columns",
        ],
    ),
    (("tp=4,pp=2", "tp=2", "Qwen2.5-7B", "--gpus", "12"), ["--train tp*pp=8: does not divide 12 ranks"]),
    (("tp=2,vp=2", "tp=2", "Qwen2.5-7B"), ["--train vp=2: one pipeline stage has no virtual ones"]),
    (("tp=2,ep=2,etp=4", "tp=2", "Qwen2.5-7B"), ["ep=2: the model has no experts", "etp=4: the model has no experts"]),
    (("tp=0", "tp=2", "Qwen2.5-7B"), ["--train tp=0: must be at least 1"]),
    (("tp=x,zz=3", "tp=2", "Qwen2.5-7B"), ["tp=x: not a number", "zz=3: unknown size"]),
    (("tp=2", "pp=2", "Qwen2.5-7B"), ["--rollout pp=2: unknown size"]),
    (("tp=2,tp=4", "tp=2", "Qwen2.5-7B"), ["tp is given twice"]),
    (("tp=2", "tp=2", "Qwen9"), ["--model=Qwen9: no such file", "Qwen2.5-VL-7B"]),
    (("tp=2", "tp=2", "Qwen2.5-7B", "--explain", HF_NAME + "s"), [f"did you mean {HF_NAME}"]),
    (("tp=2", "tp=2", "Qwen2.5-7B", "--explain", "layers.3.self_attn.k_proj.weight"), [f"did you mean {HF_NAME}"]),
    (("tp=2", "tp=2", "Qwen2.5-7B", "--network", "0", "--gpus-per-node", "-1"), ["--network=0", "--gpus-per-node=-1"]),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_mistakes_are_told_together(capsys, arguments, expected) -> None:
    train, rollout, model, *more = arguments
    assert main(["--train", train, "--rollout", rollout, "--model", model, *more]) == 2
    said = capsys.readouterr()
    assert all(part in said.err for part in expected) and not said.out


def test_model_files_that_cannot_be_used(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    texts = {"{": "not readable", "[]": "not a JSON object", '{"model_type": "bert"}': "no provider for"}
    texts |= {'{"model_type": "qwen2_5_vl"}': "mrope_section: missing in config.json"}
    texts |= {'{"model_type": "qwen2", "rope_theta": 1e4}': "config.json has no"}
    for text, expected in texts.items():
        path.write_text(text)
        assert main(["--train", "tp=1", "--rollout", "tp=1", "--model", str(path)]) == 2
        assert expected in capsys.readouterr().err


def test_starts_without_torch() -> None:
    code = "import sys, megatron_rl.plan_sync; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_a_trillion_parameters_on_4096_ranks(tmp_path) -> None:
    sizes = {"num_hidden_layers": 128, "hidden_size": 24576, "intermediate_size": 98304}
    sizes |= {"num_attention_heads": 192, "num_key_value_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps({**KNOWN_CONFIGS["Qwen2.5-7B"], **sizes}))
    start = time.perf_counter()
    plan = planned(tmp_path, "tp=8,pp=16", "tp=16", "--gpus", "4096", model=str(tmp_path))
    print(f"{time.perf_counter() - start:.1f} s")  # noqa: T201
    assert len(plan["ranks"]) == 4096 and sorted(plan["rank_permutation"]) == list(range(4096))
    # A sixteenth of 2.2 TB each, of which the own stage and shard hold at most 1/16 of that, and norms and biases.
    need, received_bytes = plan["ranks"][0]["need"], plan["minimum"]
    assert need == pytest.approx(2 * 1.1027e12 / 16, rel=1e-3)
    assert need * 15 / 16 * 0.99 < received_bytes < need
    assert sum(r["received"] for r in plan["permuted"]) < sum(r["received"] for r in plan["ranks"])
