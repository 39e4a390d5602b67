# SPDX-License-Identifier: Apache-2.0
"""The metric sinks, the progress line and the report, read back with each format's own reader."""

from __future__ import annotations

import io
import json
import math
import time

import pytest
from rich.console import Console

from megatron_rl.observe.metric_log import MetricLog, read_metrics
from megatron_rl.observe.progress import Progress, duration
from megatron_rl.observe.report import SampleRollout, plot_curves, rollout_table, write_summary


def open_log(run_dir, rank0=True, wandb="off", tensorboard=False) -> MetricLog:
    return MetricLog(run_dir, rank0, wandb, "project", tensorboard, {"seed": 1})


# ------------------------------------------------------------------------------------------------------- metrics.jsonl


def test_every_step_is_on_disk_before_the_next(tmp_path):
    log = open_log(tmp_path / "run")
    log.log(0, {"b": 1, "a": 0.5})
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 0, "a": 0.5, "b": 1.0}\n'
    log.log(1, {"a": math.inf})
    assert read_metrics(log.path) == [{"step": 0, "a": 0.5, "b": 1.0}, {"step": 1, "a": math.inf}]
    log.close()


def test_a_resume_forgets_the_steps_it_makes_again(tmp_path):
    log = open_log(tmp_path)
    for step in range(5):
        log.log(step, {"a": step})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 5, "a"')  # the process died here

    log = open_log(tmp_path)
    log.resume_from(3)
    log.log(3, {"a": 33})
    log.close()
    assert [(row["step"], row["a"]) for row in read_metrics(log.path)] == [(0, 0), (1, 1), (2, 2), (3, 33)]


DAMAGED = (b'{"step": 1, "a', b"[1]", b'{"a": 1.0}', b"\xff\xfe", b"")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_costs_no_run(tmp_path, capsys, damage):
    log = open_log(tmp_path)
    for step in range(4):
        log.log(step, {"a": step})
    log.close()
    lines = log.path.read_bytes().split(b"\n")
    damaged = b"\n".join([lines[0], damage, *lines[2:]])
    log.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged; mend or remove that line"):
        read_metrics(log.path)
    log = open_log(tmp_path)
    log.resume_from(3)
    log.close()
    assert [row["step"] for row in read_metrics(log.path)] == [0, 2]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == damaged
    said = capsys.readouterr().err
    assert f"{log.path}: line 2 is damaged" in said and "kept as metrics.jsonl.damaged-1; its 3 readable" in said


def test_a_fresh_start_forgets_everything(tmp_path):
    for _ in range(2):
        log = open_log(tmp_path)
        log.resume_from(0)
        log.log(0, {"a": 1})
        log.close()
    assert len(read_metrics(log.path)) == 1


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path / "run", rank0=False, wandb="offline", tensorboard=True)
    log.resume_from(1)
    log.log(0, {"a": 1})
    log.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    for step in range(4):
        log.log(step, {"actor/loss": step})
    log.close()
    log = open_log(tmp_path, tensorboard=True)
    log.resume_from(2)
    log.log(2, {"actor/loss": 22})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [(0, 0), (1, 1), (2, 22)]


def test_wandb_offline_needs_no_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    log = open_log(tmp_path / "run", wandb="offline")
    log.log(0, {"actor/loss": 0.25})
    log.close()
    (record,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert b"actor/loss" in record.read_bytes()


# ------------------------------------------------------------------------------------------------------------ progress


def test_phases_are_measured_and_add_up():
    progress = Progress(2, enabled=False)
    for _ in range(2):
        with progress.phase(0, "rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), progress.phase(0, "train"):
        raise KeyError
    timings = progress.end_step(0)
    assert set(timings) == {"timing_s/rollout", "timing_s/train", "timing_s/step"}
    assert 0.04 <= timings["timing_s/rollout"] <= timings["timing_s/step"]
    assert set(progress.end_step(1)) == {"timing_s/step"}


def test_a_log_file_gets_plain_lines_and_announces_long_phases_only(monkeypatch):
    # start, then three times: phase from/to, end_step
    now = iter([0.0, 1.0, 9.0, 10.0, 10.0, 21.0, 22.0, 22.0, 24.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(time, "strftime", lambda form: f"<{form}>")
    stream = io.StringIO()
    progress = Progress(3, enabled=True, stream=stream)
    for step in range(3):
        with progress.phase(step, "rollout"):
            pass
        progress.end_step(step, note="reward 0.5")
    assert stream.getvalue().splitlines() == [
        "<%H:%M:%S> step 1/3 rollout ...",
        "<%H:%M:%S> step 1/3 [20 s left] reward 0.5; 10.0 s (rollout 8.0)",
        "<%H:%M:%S> step 2/3 [12 s left] reward 0.5; 12.0 s (rollout 11.0)",
        "<%H:%M:%S> step 3/3 [12 s left] rollout ...",
        "<%H:%M:%S> step 3/3 reward 0.5; 3.0 s (rollout 2.0)",
    ]


def test_a_terminal_gets_one_line_that_rewrites_itself(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "12:00:01")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(1, enabled=True, stream=stream)
    with progress.phase(0, "rollout"):
        assert stream.getvalue() == "\r\x1b[2K12:00:01 step 1/1 rollout ..."
    progress.end_step(0)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")


def test_what_comes_before_the_first_step_and_after_a_step_is_booked_where_it_belongs(monkeypatch):
    # job begins; engine 1 to 41; steps begin at 50; gen 50 to 53, step ends at 54; save 54 to 64, booked at 65; step 2
    now = iter([0.0, 1.0, 41.0, 50.0, 50.0, 53.0, 54.0, 54.0, 64.0, 65.0, 65.0, 67.0, 68.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(time, "strftime", lambda form: "12:00")
    stream, told = io.StringIO(), []
    progress = Progress(2, enabled=True, stream=stream, on_phase=lambda step, name: told.append((step, name)))
    with progress.starting("engine"):
        pass
    assert progress.begin_steps() == {"timing_s/startup": 50.0}
    with progress.phase(0, "gen"):
        pass
    assert progress.end_step(0) == {"timing_s/gen": 3.0, "timing_s/step": 4.0}
    with progress.phase(0, "save_checkpoint"):
        pass
    assert progress.extend_step("save_checkpoint") == {"timing_s/save_checkpoint": 10.0, "timing_s/step": 15.0}
    with progress.phase(1, "gen"):
        pass
    assert progress.end_step(1) == {"timing_s/gen": 2.0, "timing_s/step": 3.0}
    assert told == [(0, "engine"), (0, "gen"), (0, "save_checkpoint"), (1, "gen")]
    assert stream.getvalue().splitlines()[:3] == [
        "12:00 start engine ...",
        "12:00 start 50.0 s (engine 40.0)",
        "12:00 step 1/2 gen ...",
    ]


def test_a_row_is_extended_in_place(tmp_path):
    log = open_log(tmp_path)
    log.extend({"ignored": 1})  # there is no row yet
    log.log(0, {"a": 1})
    log.log(1, {"timing_s/step": 1.25, "b": 2})
    log.extend({"timing_s/step": 9.0, "timing_s/save": 3.5})
    log.extend({"timing_s/save": 3})
    log.log(2, {"a": 3})
    log.close()
    rows = [{"step": 0, "a": 1}, {"step": 1, "b": 2, "timing_s/save": 3, "timing_s/step": 9}, {"step": 2, "a": 3}]
    assert read_metrics(log.path) == rows

    log = open_log(tmp_path)  # an evaluation that was left out is made up after a resume
    log.resume_from(2)
    log.extend({"eval/accuracy": 0.5})
    log.log(2, {"a": 4})
    log.close()
    assert read_metrics(log.path) == [rows[0], {**rows[1], "eval/accuracy": 0.5}, {"step": 2, "a": 4}]


def test_durations_read_well():
    assert [duration(seconds) for seconds in (0.4, 42, 200, 7500)] == ["0 s", "42 s", "3 min 20 s", "2 h 5 min"]


# -------------------------------------------------------------------------------------------------------------- report


def write_rows(run_dir, rows) -> None:
    log = open_log(run_dir)
    for step, row in enumerate(rows):
        log.log(step, row)
    log.close()


def panel_count(path) -> int:
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    assert height == 4 * 120
    return width // (6 * 120)


def test_curves_show_the_panels_that_have_data(tmp_path):
    rl = [{"critic/score/mean": 0.1 * i, "rollout/logprob_gap_mean": 1e-6, "other": 1.0} for i in range(5)]
    rl[0]["eval/accuracy"] = 0.2
    rl[2]["rollout/logprob_gap_mean"] = math.nan
    write_rows(tmp_path / "rl", rl)
    write_rows(tmp_path / "sft", [{"sft/nll": 2.0}, {"sft/nll": 1.0}])
    write_rows(tmp_path / "zero", [{"rollout/logprob_gap_mean": 0.0}])
    write_rows(tmp_path / "other", [{"other": 1.0}])
    assert panel_count(plot_curves(tmp_path / "rl")) == 2
    assert panel_count(plot_curves(tmp_path / "sft")) == 1
    assert panel_count(plot_curves(tmp_path / "zero")) == 1
    assert plot_curves(tmp_path / "other") is None
    assert not (tmp_path / "other/curves.png").exists()


def test_the_table_shows_texts_in_full_and_as_they_are():
    response = "<think>[red] " + "word " * 100 + "</think><answer>B</answer>"
    stream = io.StringIO()
    table = rollout_table([SampleRollout("Which one?", response, "B", 0.9)])
    Console(file=stream, width=100, color_system=None).print(table)
    text = stream.getvalue()
    assert text.count("word") == 100
    for part in ("question", "response", "answer", "reward", "Which one?", "<think>[red]", "0.900"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_summary_is_replaced_in_one_piece(tmp_path):
    write_summary(tmp_path, {"eval/accuracy": 0.5})
    path = write_summary(tmp_path, {"eval/accuracy": 0.75, "step": 3})
    assert json.loads(path.read_text()) == {"eval/accuracy": 0.75, "step": 3}
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"bad": object()})
    assert json.loads(path.read_text())["step"] == 3
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]
