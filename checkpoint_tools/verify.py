# SPDX-License-Identifier: Apache-2.0
"""Proof that a Hugging Face folder and a Megatron checkpoint are the same weights, and that others open it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.console import follow
from checkpoint_tools.folders import HF_MARK
from checkpoint_tools.intact import check_files
from checkpoint_tools.weights import McoreWeights, different_bits
from megatron_rl.errors import raise_all
from model_providers.hf_checkpoint import HfCheckpoint

READERS = ("transformers", "vllm")
PROMPT = "The quick brown fox jumps over the lazy dog."
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor, or one reader, for which the two sides do not agree."""

    name: str
    problem: str


@dataclass(frozen=True, slots=True)
class Report:
    hf: str
    mcore: str
    num_tensors: int
    num_parameters: int
    differences: tuple[Difference, ...]
    opened_in: tuple[str, ...]
    logprob_gap: float | None
    """Largest difference between transformers' log-probabilities and ours; None if it was not asked for."""

    def as_dict(self) -> dict[str, object]:
        return {"same": not self.differences, **asdict(self)}


def verify(
    hf: Path, mcore: Path, open_in: Collection[str] = ("transformers",), logits: bool = False, prompt: str = PROMPT
) -> Report:
    """Compare every tensor, then open the folder; a folder whose tensors differ is not opened."""
    raise_all(_unknown(open_in), "verify")
    if not (hf / HF_MARK).is_file():
        raise ValueError(f"--hf={hf}: holds no {HF_MARK}; give the folder of a Hugging Face checkpoint")
    check_files(mcore)
    checkpoint, weights = HfCheckpoint(hf), McoreWeights(mcore)
    differences = list(compare(checkpoint, weights))
    opened, gap = [], None
    if not differences and (open_in or logits):
        from checkpoint_tools.readers import logprob_gap, problems_in_transformers, problems_in_vllm

        for reader, problems in (("transformers", problems_in_transformers), ("vllm", problems_in_vllm)):
            if reader in open_in:
                found = problems(hf, prompt)
                differences += [Difference(reader, problem) for problem in found]
                opened += [] if found else [reader]
        if logits:
            gap = logprob_gap(hf, mcore, prompt)
            if not gap <= LOGPROB_TOLERANCE:
                why = f"our log-probabilities are up to {gap:.2e} from transformers', more than {LOGPROB_TOLERANCE:.0e}"
                differences.append(Difference("logits", why))
    names = checkpoint.names()
    return Report(
        hf=str(hf),
        mcore=str(mcore),
        num_tensors=len(names),
        num_parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in names),
        differences=tuple(differences),
        opened_in=tuple(opened),
        logprob_gap=gap,
    )


def compare(checkpoint: HfCheckpoint, weights: McoreWeights) -> Iterator[Difference]:
    """Every difference in names, shapes, dtypes and bits."""
    for name, problem in weights.problems.items():
        yield Difference(name, f"in the Megatron checkpoint: {problem}")
    ours, theirs = weights.names(), set(checkpoint.names())
    for name in sorted(theirs.difference(ours)):
        yield Difference(name, "only in the Hugging Face folder")
    for name in follow(ours, len(ours), "comparing"):
        if name not in theirs:
            yield Difference(name, "only in the Megatron checkpoint")
        elif weights.is_readable(name) and (found := _difference(checkpoint.tensor(name), weights.tensor(name))):
            yield Difference(name, found)


def _difference(hf: Tensor, mcore: Tensor) -> str | None:
    if hf.shape != mcore.shape:
        return f"shape {list(hf.shape)} in the Hugging Face folder, {list(mcore.shape)} in the Megatron checkpoint"
    if hf.dtype != mcore.dtype:
        return f"{hf.dtype} in the Hugging Face folder, {mcore.dtype} in the Megatron checkpoint"
    other = different_bits(hf, mcore)
    if not other.any():
        return None
    distance = (hf.flatten()[other].double() - mcore.flatten()[other].double()).abs().max()
    return f"{int(other.sum())} of {hf.numel()} elements differ, by up to {float(distance):.3g}"


def _unknown(open_in: Collection[str]) -> Iterator[str]:
    for reader in open_in:
        if reader not in READERS:
            yield f"--open-in={reader}: unknown; choose from {', '.join(READERS)}"
