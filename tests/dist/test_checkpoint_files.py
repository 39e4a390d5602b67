# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose files are not what was written is refused by name, whoever reads it; none runs foreign code; a
save that fails leaves nothing behind."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from checkpoint_tools.cli import main
from checkpoint_tools.digests import DIGESTS_FILE, digest_of
from checkpoint_tools.intact import problems_of_files, read_metadata
from megatron_rl.algorithms.losses import NllLoss
from megatron_rl.training import checkpoint
from tests import tiny_policy as tp
from tests.world import WorldFailed, run_world

OLD_CHECKPOINT_HAS = {".metadata", "common.pt", "metadata.json", "state.json"}


def _save(folder: Path, root: Path, steps: tuple[int, ...]) -> None:
    mesh = tp.join(tensor=2)
    trainer = tp.open_trainer(folder, mesh)
    samples = tp.mixed_samples(trainer.provider)
    for step in steps:
        trainer.policy.train(tp.unscored(trainer.pack(samples)), tp.random_embeds(samples), NllLoss(), step)
        checkpoint.save(root, step, trainer.policy, mesh, {}, hf_source=str(folder))


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step_1 and step_2 of two ranks. Read only."""
    root = tmp_path_factory.mktemp("saved")
    run_world(2, lambda _: _save(tiny_checkpoint, root, (1, 2)))
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def _load(folder: Path, root: Path, step: int) -> str:
    """What `load` raises on this rank; the weights that it gives otherwise."""
    mesh = tp.join(tensor=2)
    policy = tp.open_trainer(folder, mesh).policy
    try:
        checkpoint.load(checkpoint.step_folder(root, step), policy, mesh)
    except ValueError as error:
        return str(error)
    return str(sum(float(t.double().sum()) for t in tp.snapshot(policy).values()))


def test_every_file_is_listed_with_what_is_on_the_disk(saved: Path) -> None:
    folder = saved / "step_2"
    listed = json.loads((folder / DIGESTS_FILE).read_text())["files"]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {DIGESTS_FILE}
    assert listed.keys() == files
    assert {"__0_0.distcp", "__1_0.distcp", "rng/rank_1.safetensors", "hf/config.json"} | OLD_CHECKPOINT_HAS <= files
    for name, entry in listed.items():
        found = digest_of(folder / name)
        assert entry == {"num_bytes": found.num_bytes, "sha256": found.sha256}, name


def test_one_flipped_bit_anywhere_is_found(copy: Path) -> None:
    folder, rng = copy / "step_2", random.Random(0)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name != DIGESTS_FILE)
    for path in [*files, *[folder / "__0_0.distcp", folder / "__1_0.distcp"] * 10]:
        content = path.read_bytes()
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        (problem,) = problems_of_files(folder)
        assert problem.startswith(f"{path.relative_to(folder).as_posix()}: its content has changed"), problem
        path.write_bytes(content)
    assert problems_of_files(folder) == []


def _of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "step_1" / "__1_0.distcp", folder)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "__1_0.distcp: its content": _of_another_step,
    "__0_0.distcp: 100 bytes": lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:100]),
    "__0_0.distcp: missing": lambda f: (f / "__0_0.distcp").unlink(),
    "common.pt: 0 bytes": lambda f: (f / "common.pt").write_bytes(b""),
    "common.pt: missing": lambda f: (f / "common.pt").unlink(),
    ".metadata: missing": lambda f: (f / ".metadata").unlink(),
    "state.json: 3 bytes": lambda f: (f / "state.json").write_bytes(b"{\n}"),
    f"{DIGESTS_FILE}: not readable": lambda f: (f / DIGESTS_FILE).write_bytes(b"{"),
}
OLD_DAMAGES = {
    "__0_0.distcp: 100 bytes, at least": DAMAGES["__0_0.distcp: 100 bytes"],
    "__0_0.distcp: missing": DAMAGES["__0_0.distcp: missing"],
    "common.pt: cannot be read": DAMAGES["common.pt: 0 bytes"],
    "state.json: cannot be read": lambda f: (f / "state.json").write_bytes(b"{"),
    ".metadata: cannot be read": lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:500]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_names_folder_file_and_remedy(damage: str, copy: Path, tiny_checkpoint: Path) -> None:
    DAMAGES[damage](copy / "step_2")
    ranks = run_world(2, lambda _: _load(tiny_checkpoint, copy, 2))
    assert ranks[0] == ranks[1] and "\n" not in ranks[0]
    assert ranks[0].startswith(f"{copy}/step_2 cannot be read ({damage}")
    assert ranks[0].endswith("; remove it to go on from step_1")


@pytest.mark.parametrize("damage", OLD_DAMAGES)
def test_damage_of_a_checkpoint_without_digests(damage: str, copy: Path) -> None:
    """Digests came later; such a checkpoint loads, and what can be known of it is looked at."""
    folder = copy / "step_2"
    (folder / DIGESTS_FILE).unlink()
    assert problems_of_files(folder) == []
    OLD_DAMAGES[damage](folder)
    (problem,) = problems_of_files(folder)
    assert problem.startswith(damage)


def test_a_checkpoint_without_digests_loads(copy: Path, tiny_checkpoint: Path) -> None:
    with_digests = run_world(2, lambda _: _load(tiny_checkpoint, copy, 2))
    (copy / "step_2" / DIGESTS_FILE).unlink()
    assert run_world(2, lambda _: _load(tiny_checkpoint, copy, 2)) == with_digests
    assert float(with_digests[0])


@pytest.mark.parametrize("command", ["inspect", "verify", "mcore-to-hf"])
def test_the_tools_refuse_a_damaged_checkpoint(
    command: str, copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _of_another_step(copy / "step_2")
    options = {
        "inspect": [str(copy)],
        "verify": ["--hf", str(tiny_checkpoint), "--mcore", str(copy)],
        "mcore-to-hf": ["--mcore", str(copy), "--out", str(copy.parent / "out")],
    }
    assert main([command, *options[command]]) == 2
    said = capsys.readouterr().err
    assert f"{copy}/step_2: cannot be read (__1_0.distcp: its content has changed" in said and said.count("\n") == 1


class _Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old", [False, True], ids=["with digests", "without"])
def test_metadata_from_elsewhere_runs_no_code(
    old: bool, copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, touched = copy / "step_2", copy.parent / "touched"
    (folder / ".metadata").write_bytes(pickle.dumps(_Touch(touched)))
    (folder / DIGESTS_FILE).unlink()
    if not old:
        checkpoint.write_digests(folder, {})
    assert main(["inspect", str(folder)]) == 2
    assert "names posix.system, which no checkpoint needs: foreign code" in capsys.readouterr().err
    said = run_world(2, lambda _: _load(tiny_checkpoint, copy, 2))
    assert "foreign code" in said[0] and not touched.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert touched.exists(), "the trap works"


def test_extra_states_from_elsewhere_run_no_code(copy: Path, tiny_checkpoint: Path) -> None:
    folder, touched = copy / "step_2", copy.parent / "touched"
    metadata = read_metadata(folder)
    index, entry = next((i, e) for i, e in metadata.storage_data.items() if "_extra_state" in i.fqn)
    torch.save(_Touch(touched), folder / "trap.distcp")
    size = (folder / "trap.distcp").stat().st_size
    metadata.storage_data[index] = type(entry)("trap.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint.write_digests(folder, {})
    said = run_world(2, lambda _: _load(tiny_checkpoint, copy, 2))
    assert f"trap.distcp: {index.fqn} cannot be read" in said[0] and not touched.exists()


def _save_on_a_small_disk(folder: Path, root: Path, limit: int) -> str:
    mesh = tp.join(tensor=2)
    policy = tp.open_trainer(folder, mesh).policy
    checkpoint.save(root, 1, policy, mesh, {}, hf_source=str(folder))
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    else:
        real = shutil.disk_usage(root)
        checkpoint.shutil.disk_usage = lambda _: real._replace(free=10_000)
    try:
        checkpoint.save(root, 2, policy, mesh, {}, hf_source=str(folder))
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("limit", "reason"),
    [(0, "it takes 6,3"), (100_000, "[Errno 27] File too large"), (1000, "a file of rank 0 failed (")],
    ids=["known before", "a tensor", "the first file"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    limit: int, reason: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A bound on the size of files stands for the full disk: the write fails in the same place."""
    ranks = run_world(2, lambda _: _save_on_a_small_disk(tiny_checkpoint, tmp_path, limit), grace=20)
    assert ranks[0].startswith(f"{tmp_path}/step_2 cannot be written: {reason}"), ranks[0]
    assert "bytes" in ranks[0] and "earlier checkpoints are whole" in ranks[0] and "\n" not in ranks[0]
    assert ranks[1].startswith(f"{tmp_path}/step_2 cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert problems_of_files(tmp_path / "step_1") == []


def test_the_bytes_asked_for_are_those_of_the_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = run_world(2, lambda _: _save_on_a_small_disk(tiny_checkpoint, tmp_path, limit=0))[0]
    asked = int(said.split("it takes ")[1].split(" bytes")[0].replace(",", ""))
    written = sum(path.stat().st_size for path in (tmp_path / "step_1").glob("*.distcp"))
    assert 0.9 * written < asked <= written


def test_megatron_core_still_forks_its_writers() -> None:
    """Else `RankSave` can go."""
    source = inspect.getsource(filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc)
    assert 'get_context("fork")' in source


# ------------------------------------------------------------------------------------------------- kills during saves


def _save_until_killed(folder: Path, root: Path, start: Any) -> None:
    mesh = tp.join(tensor=2)
    trainer = tp.open_trainer(folder, mesh)
    samples = tp.mixed_samples(trainer.provider)
    steps = checkpoint.list_steps(root)
    if steps:
        checkpoint.load(checkpoint.step_folder(root, steps[-1]), trainer.policy, mesh)
    first = steps[-1] + 1 if steps else 1
    for step in range(first, first + 50):
        trainer.policy.train(tp.unscored(trainer.pack(samples)), tp.random_embeds(samples), NllLoss(), step)
        if step == first:
            start.set()
        checkpoint.save(root, step, trainer.policy, mesh, {}, hf_source=str(folder))
        if mesh.rank == 0:
            checkpoint.prune(root, keep=2, best=None)


def _children_of_init() -> set[int]:
    """Python processes without a parent, which is where a killed rank's children end."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == 1 and b"python" in (path.parent / "cmdline").read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def _kill_in_saves(folder: Path, root: Path, num_kills: int, seed: int) -> None:
    """Kill a rank at a random moment of saving, again and again; what is there afterwards is whole and goes on."""
    import multiprocessing
    import threading
    import time

    rng, before = random.Random(seed), _children_of_init()
    newest = 0
    for _ in range(num_kills):
        start, victim = multiprocessing.get_context("fork").Event(), rng.randrange(2)
        pids = multiprocessing.get_context("fork").Array("i", 2)

        def body(rank: int, start: Any = start, pids: Any = pids) -> None:
            pids[rank] = os.getpid()
            _save_until_killed(folder, root, start)

        def kill(start: Any = start, pids: Any = pids, victim: int = victim) -> None:
            start.wait(60)
            time.sleep(rng.uniform(0, 0.6))
            os.kill(pids[victim], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(WorldFailed, match="killed by SIGKILL"):
            run_world(2, body, grace=0.1)
        killer.join()
        steps = checkpoint.list_steps(root)
        assert not steps or steps[-1] >= newest, "a checkpoint that was there is gone"
        newest = steps[-1] if steps else 0
        assert [problem for step in steps for problem in problems_of_files(root / f"step_{step}")] == []
    assert _children_of_init() <= before, "processes stay behind"
    assert newest > 0
    ranks = run_world(2, lambda _: _load(folder, root, newest))
    assert all(float(rank) for rank in ranks)


def test_kills_during_saves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _kill_in_saves(tiny_checkpoint, tmp_path, num_kills=5, seed=0)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_two_hundred_kills_during_saves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _kill_in_saves(tiny_checkpoint, tmp_path, num_kills=200, seed=1)
