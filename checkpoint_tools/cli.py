# SPDX-License-Identifier: Apache-2.0
"""`python -m checkpoint_tools COMMAND`: 0 done or same, 1 the weights differ, 2 wrong usage or unreadable input."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from checkpoint_tools.console import note, say, size_text, write_json
from checkpoint_tools.folders import find_mcore

Command = Callable[[argparse.Namespace], tuple[int, dict[str, object]]]

DONE, DIFFERENT, UNUSABLE = 0, 1, 2

OVERVIEW = """\
convert   python -m checkpoint_tools hf-to-mcore --hf Qwen2.5-VL-7B-Instruct --out start
export    python -m checkpoint_tools mcore-to-hf --mcore runs/grpo/checkpoints --out exported
compare   python -m checkpoint_tools verify --hf exported --mcore runs/grpo/checkpoints
look      python -m checkpoint_tools inspect exported
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        # What the libraries say about each other and about the lack of a GPU is no news to who converts files.
        warnings.filterwarnings("ignore", module=r"torch\.|megatron\.core\.")
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            status, report = args.run(args)
            if args.json:
                write_json(args.json, report)
        except (ValueError, OSError, SafetensorError) as error:
            note(f"{args.command}: {error}")
            return UNUSABLE
    return status


def _hf_to_mcore(args: argparse.Namespace) -> tuple[int, dict[str, object]]:
    from checkpoint_tools.hf_to_mcore import hf_to_mcore

    report = hf_to_mcore(args.hf, args.out, args.tp, args.pp, args.force)
    say(f"{args.out}: {report['num_parameters']:,} parameters in {report['num_tensors']} tensors, {_size(report)}")
    return DONE, report


def _mcore_to_hf(args: argparse.Namespace) -> tuple[int, dict[str, object]]:
    from checkpoint_tools.mcore_to_hf import mcore_to_hf

    folder = find_mcore(args.mcore, "--mcore")
    report = mcore_to_hf(folder, args.out, args.dtype, args.max_shard_size, args.force)
    what = f"{report['num_tensors']} tensors in {report['num_files']} files, {report['dtype']}, {_size(report)}"
    say(f"{args.out}: {what}, from {folder}")
    return DONE, report


def _verify(args: argparse.Namespace) -> tuple[int, dict[str, object]]:
    from checkpoint_tools.verify import PROMPT, verify

    open_in = [] if args.open_in == "none" else args.open_in.split(",")
    report = verify(args.hf, find_mcore(args.mcore, "--mcore"), open_in, args.logits, args.prompt or PROMPT)
    if report.differences:
        say(f"{report.hf} and {report.mcore} differ:")
        for difference in report.differences:
            say(f"  {difference.name}: {difference.problem}")
        return DIFFERENT, report.as_dict()
    say(f"same: {report.num_tensors} tensors, {report.num_parameters:,} parameters, equal to the last bit")
    for reader in report.opened_in:
        say(f"opens in {reader}")
    if report.logprob_gap is not None:
        say(f"log-probabilities are within {report.logprob_gap:.1e} of transformers'")
    return DONE, report.as_dict()


def _inspect(args: argparse.Namespace) -> tuple[int, dict[str, object]]:
    from checkpoint_tools.inspect import inspect, show

    summary = inspect(args.folder)
    show(summary)
    return DONE, summary.as_dict()


def _size(report: dict[str, object]) -> str:
    return size_text(int(str(report["bytes"])))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools",
        description="Convert, compare and look at checkpoints, on a CPU.",
        epilog=OVERVIEW + "\nexit status: 0 done, 1 the weights differ, 2 wrong usage or unreadable input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_hf_to_mcore(commands)
    _add_mcore_to_hf(commands)
    _add_verify(commands)
    _add_inspect(commands)
    return parser


def _command(commands: Any, name: str, run: Command, summary: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  python -m checkpoint_tools {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file as well")
    return parser


def _add_hf_to_mcore(commands: Any) -> None:
    parser = _command(
        commands,
        "hf-to-mcore",
        _hf_to_mcore,
        "Write the weights of a Hugging Face folder as a Megatron checkpoint, which any layout can load.",
        "--hf Qwen2.5-VL-7B-Instruct --out start --tp 4 --pp 2",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="check that this tensor parallel size fits")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="check that this pipeline parallel size fits")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is in the way")


def _add_mcore_to_hf(commands: Any) -> None:
    parser = _command(
        commands,
        "mcore-to-hf",
        _mcore_to_hf,
        "Export a Megatron checkpoint of any layout to a folder that transformers and vLLM open.",
        "--mcore runs/grpo/checkpoints --out exported --dtype bfloat16",
    )
    parser.add_argument("--mcore", type=Path, required=True, metavar="DIR", help="a step_N folder, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    choices = ("keep", "bfloat16", "float32")
    parser.add_argument("--dtype", choices=choices, default="keep", help="of all tensors (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is in the way")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        _verify,
        "Prove that a Hugging Face folder and a Megatron checkpoint hold the same weights, bit by bit.",
        "--hf exported --mcore runs/grpo/checkpoints --open-in transformers,vllm --logits",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--mcore", type=Path, required=True, metavar="DIR", help="a step_N folder, or a folder of them")
    readers = "open the folder in these too: transformers, vllm or both with a comma; or none (default: transformers)"
    parser.add_argument("--open-in", default="transformers", metavar="READERS", help=readers)
    parser.add_argument("--logits", action="store_true", help="also compare our model's log-probabilities, in fp32")
    parser.add_argument("--prompt", metavar="TEXT", help="text for --logits and vllm (default: a short sentence)")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "Show kind, step, shapes, dtypes, number of parameters and size of a checkpoint.",
        "runs/grpo/checkpoints",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a Hugging Face folder, a step_N, or a folder of them")
