# SPDX-License-Identifier: Apache-2.0
"""Two jobs never share a run folder; what a killed one leaves behind is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import command_line
from megatron_rl.config.schema import SftConfig
from megatron_rl.runtime.run_lock import LOCK_FILE, held_run_folder

HOLD = """
import sys
from pathlib import Path
from megatron_rl.runtime.run_lock import held_run_folder
with held_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
HOLD_AND_FORK = HOLD.replace(
    'print("held"', 'import os; os.fork() or (sys.stdin.readline(), sys.exit())\n    print("held"'
)


def _holder(run_dir: Path, code: str = HOLD) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_job_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    holder = _holder(tmp_path / "run")
    try:
        for _ in range(2):  # being refused must not end the other's lock
            with pytest.raises(ValueError) as refused, held_run_folder(tmp_path / "run"):
                pass
            said = str(refused.value)
            assert said.startswith(f"run_dir={tmp_path}/run: process {holder.pid} on {socket.gethostname()}, started ")
            assert "use another run_dir" in said and "\n" not in said
    finally:
        holder.communicate("go\n", timeout=30)
    assert list((tmp_path / "run").iterdir()) == []
    with held_run_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("code", [HOLD, HOLD_AND_FORK], ids=["alone", "with a child that lives on"])
def test_the_lock_of_a_killed_job_is_taken_over(tmp_path: Path, code: str) -> None:
    holder = _holder(tmp_path, code)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    try:
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
        with held_run_folder(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK_FILE).exists()
    finally:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.close()
        holder.stdout.close()


def test_the_lock_ends_when_the_body_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held_run_folder(tmp_path):
        raise KeyError
    _holder(tmp_path).communicate("go\n", timeout=30)


def test_a_refused_job_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"run_dir: {run_dir}\nmodel: {{hf: none}}\ndata: {{train: none}}\ntrain: {{num_steps: 1}}\n")
    monkeypatch.setattr(command_line, "check", lambda *_: None)
    ran: list[object] = []
    holder = _holder(run_dir)
    try:
        with pytest.raises(SystemExit) as stopped:
            command_line.run_job([str(recipe)], SftConfig, "sft", "", ran.append, lambda *_: None)
        assert stopped.value.code == 2 and not ran
        assert [path.name for path in run_dir.iterdir()] == [LOCK_FILE]
        assert f"process {holder.pid}" in capsys.readouterr().err
    finally:
        holder.communicate("go\n", timeout=30)
    command_line.run_job([str(recipe)], SftConfig, "sft", "", ran.append, lambda *_: None)
    assert len(ran) == 1 and [path.name for path in run_dir.iterdir()] == ["config.yaml"]
