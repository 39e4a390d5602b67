# SPDX-License-Identifier: Apache-2.0
"""What reading the data of a recipe tells: the prompts, what is set aside, and whether the job would stop."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table
from transformers import AutoTokenizer

from megatron_rl import sft, train
from megatron_rl.config.io import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.reading.command_line import check_data, main
from megatron_rl.reading.report import histogram

KEYS = {"usable", "set_aside", "unused_columns", "rows"}
ROW_KEYS = {"source", "prompt_text", "answer", "num_tokens", "media"}
MEDIA_KEYS = {"kind", "path", "num_frames", "frame_indices", "timestamps", "size_hw", "num_tokens"}
PLAIN = {"problem": "1+1?", "answer": "2"}


@pytest.fixture
def recipe(tmp_path, tiny_checkpoint):
    """Writes records to train.jsonl, and a recipe that reads them."""

    def write(*records: dict[str, object], job: str = "rl", **data: object) -> str:
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
        settings = {"train": str(tmp_path / "train.jsonl"), "num_frames": 4, "max_prompt_tokens": 512}
        settings |= {"min_pixels": 3136, "max_pixels": 3136}
        steps = {"num_steps": 2, "prompts_per_step": 2} | ({"max_answer_tokens": 16} if job == "sft" else {})
        model, log = {"hf": str(tiny_checkpoint)}, {"wandb": "off"}
        tree = {"run_dir": str(tmp_path / "run"), "model": model, "train": steps, "log": log}
        (tmp_path / "recipe.yaml").write_text(json.dumps(tree | {"data": settings | data}))
        return str(tmp_path / "recipe.yaml")

    return write


def inspect(recipe: str, folder: Path, *arguments: str) -> tuple[int, dict]:
    status = main([recipe, "--json", str(folder / "out.json"), *arguments])
    return status, json.loads((folder / "out.json").read_text())


def test_a_video_row(tmp_path, tiny_checkpoint, tiny_videos, recipe, capsys):
    video = next((tiny_videos / "videos").glob("*.mp4"))
    turns = [
        {"from": "human", "value": "<image>\nWhat moves?"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "red"},
    ]
    path = recipe({"id": 3, "conversations": turns, "video": str(video)}, PLAIN)
    status, found = inspect(path, tmp_path, "--rows", "1")
    assert status == 0 and set(found) == KEYS and (found["usable"], found["set_aside"]) == (2, [])
    [row] = found["rows"]
    [medium] = row["media"]
    assert set(row) == ROW_KEYS and set(medium) == MEDIA_KEYS and found["unused_columns"] == ["id"]
    assert (medium["kind"], medium["path"], medium["num_frames"]) == ("video", str(video), 4)
    assert medium["size_hw"] == [56, 56]
    assert len(medium["timestamps"]) == len(medium["frame_indices"]) == 4 and medium["num_tokens"] == 8
    places = [{"type": "video"}, {"type": "text", "text": "\nWhat moves?"}]
    messages = [
        {"role": "user", "content": places},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert row["prompt_text"] == expected and row["answer"] == "red"
    assert row["num_tokens"] == len(tokenizer.encode(expected, add_special_tokens=False)) + 7  # 8 tokens for one place
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing in the data stands in the way of the job"
    assert "columns that nothing uses: id" in out and not (tmp_path / "run").exists()


def test_system_turns_frames_and_images_reach_the_prompt(tmp_path, recipe):
    for number in range(4):
        Image.new("RGB", (56, 56), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    frames = [f"{number}.png" for number in range(4)]
    record = PLAIN | {"system": "Be short.", "videos": [frames], "images": "0.png", "problem": "Is <image> in <video>?"}
    status, found = inspect(recipe(record), tmp_path)
    [row] = found["rows"]
    assert status == 0
    assert row["prompt_text"].startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nIs ")
    assert [item["kind"] for item in row["media"]] == ["image", "video"]
    assert row["media"][1]["path"] == str(tmp_path) and row["media"][1]["timestamps"] == [0.0, 0.5, 1.0, 1.5]


def test_parquet_with_the_pictures_in_it(tmp_path, recipe):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    record = PLAIN | {"images": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}]}
    write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    status, found = inspect(recipe(train=str(tmp_path / "a.parquet")), tmp_path)
    [item] = found["rows"][0]["media"]
    assert status == 0 and Path(item["path"]).parent == tmp_path / "run/media" and not (tmp_path / "run").exists()


def test_configuration_and_tokenizer_are_enough(tmp_path, tiny_checkpoint, recipe):
    (tmp_path / "bare").mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    status, found = inspect(recipe(PLAIN), tmp_path, f"model.hf={tmp_path}/bare")
    assert status == 0 and found["usable"] == 1


def test_what_is_set_aside_and_when_the_job_would_stop(tmp_path, recipe, capsys):
    bad = [{"answer": "no problem"}, PLAIN | {"videos": "gone.mp4"}, PLAIN | {"problem": "long " * 200}]
    good = [PLAIN] * 9
    status, found = inspect(recipe(*bad, *good, max_prompt_tokens=100, max_bad_fraction=1.0), tmp_path)
    assert status == 0 and found["usable"] == 9
    assert {row["kind"]: row["source"] for row in found["set_aside"]} == {
        "row": "train.jsonl:1", "media": "train.jsonl:2", "overlong": "train.jsonl:3",
    }  # fmt: skip
    assert inspect(recipe(*bad[:1], *good[:3]), tmp_path)[0] == 1
    assert "data.max_bad_fraction=0.2: 1 of 4 rows" in capsys.readouterr().out
    status, _ = inspect(recipe(bad[1], *good, shuffle=False), tmp_path)
    out = capsys.readouterr().out
    assert status == 1 and "1 of 2 rows of step 0 cannot be used" in out and out.endswith("the job would stop\n")
    assert inspect(recipe(*bad[2:], max_prompt_tokens=100), tmp_path)[0] == 1
    assert main([recipe(PLAIN, train="gone.jsonl")]) == 2


def test_answers_of_sft(tmp_path, recipe):
    records = [PLAIN] * 8 + [PLAIN | {"answer": "A<|video_pad|>B"}, PLAIN | {"answer": "x" * 99}]
    _, found = inspect(recipe(*records, job="sft", max_bad_fraction=1.0), tmp_path)
    reasons = [row["reason"] for row in found["set_aside"]]
    assert reasons[0] == "the answer contains <|video_pad|>, a control token of the model"
    assert "is over train.max_answer_tokens=16" in reasons[1] and found["usable"] == 8
    assert inspect(recipe(*records, max_bad_fraction=1.0), tmp_path)[1]["usable"] == 10, "RL does not learn answers"


def test_only_the_first_records(tmp_path, recipe):
    assert inspect(recipe(PLAIN, PLAIN, {}), tmp_path, "--check-rows", "2")[1]["usable"] == 2


def test_lengths():
    assert histogram([10, 10, 25])[0] == "prompt tokens of 3 rows: 10 to 25, 15 on average"
    counts = [int(line.split()[-1]) for line in histogram(list(range(80)))[1:]]
    assert counts == [10] * 8 and len(histogram([5])) == 2


# ------------------------------------------------------------------------------------------------ --check of every job


@pytest.mark.parametrize(("job", "module"), [("rl", train), ("sft", sft)])
def test_check_reads_the_rows(tmp_path, recipe, job, module, capsys):
    module.main([recipe(PLAIN, PLAIN, PLAIN | {"extra": 1}, job=job), "--check"])
    done = capsys.readouterr()
    assert done.out.splitlines()[-1] == "nothing stands in the way of this run on 1 rank"
    assert "columns that nothing uses: extra" in done.out
    with pytest.raises(SystemExit):
        module.main([recipe({"frage": "q", "antwort": "a"}, job=job), "--check"])
    lines = capsys.readouterr().err.splitlines()
    assert any("the row has frage, antwort; name its column with data.columns.problem" in line for line in lines)
    assert lines[-1] == "this run cannot start" and not (tmp_path / "run").exists()


def test_check_opens_the_media_of_the_first_rows(tmp_path, recipe, capsys):
    path = recipe(*[PLAIN | {"videos": "gone.mp4"}] * 3)
    with pytest.raises(SystemExit):
        train.main([path, "--check"])
    assert "none of 3 rows can be used" in capsys.readouterr().err


def test_check_calls_the_reward_once(tmp_path, recipe):
    (tmp_path / "r.py").write_text(
        "from pathlib import Path\n"
        "def f(prompts, completions):\n"
        f"    Path({str(tmp_path / 'called')!r}).open('a').write('x' * len(completions))\n"
        "    return [{'overall': 'high'}]\n"
    )
    cfg = load_config(recipe(PLAIN, PLAIN), RlConfig, [f"reward.name={tmp_path}/r.py:f"])
    with pytest.raises(ValueError, match=r"^reward\.name=.*r\.py:f: returned overall='high'"):
        check_data(cfg, None)
    assert (tmp_path / "called").read_text() == "x"


def test_a_batch_larger_than_the_data_set_is_said(tmp_path, recipe, capsys):
    train.main([recipe(PLAIN), "--check"])
    assert "data.train has 1 usable rows, so that a batch holds rows more than once" in " ".join(
        capsys.readouterr().out.split()
    )
