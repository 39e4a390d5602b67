# SPDX-License-Identifier: Apache-2.0
"""What both sides of step.py are given (one model folder, one list of prompts, one reward) and what they report.

The model never ends its turn, so every response has full length without a logits processor on either side.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import string
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "model"
LEARNING_RATE, TEMPERATURE, CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 1e-4, 1.0, 0.2, 0.3, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process's work: `num_steps` steps of `num_prompts` prompts of `prompt_tokens`, each answered `num_samples`
    times by `response_tokens`."""

    folder: str
    """Holds the model, the prompts and what a side writes; made and removed by step.py."""
    side: str
    """`ours` or the name of a variant of TRL."""
    prompt_tokens: int
    num_steps: int
    num_prompts: int = 8
    num_samples: int = 8
    response_tokens: int = 32

    @property
    def samples_per_step(self) -> int:
        return self.num_prompts * self.num_samples

    @property
    def model(self) -> Path:
        return Path(self.folder) / MODEL

    @property
    def rows(self) -> Path:
        return Path(self.folder) / f"rows_{self.prompt_tokens}.jsonl"

    @property
    def out(self) -> Path:
        return Path(self.folder) / f"{self.side}_{self.prompt_tokens}"


def write_model(folder: Path) -> None:
    """A Qwen2 of 2 layers and width 128 with random weights that never ends its turn, and the byte-level tokenizer.

    Channel 0 is large in every embedding, and the end token's output row reads that channel alone: its logit is about
    -80, the others' a few units.
    """
    import torch

    from megatron_rl.runtime.device import define_torchvision_operators

    define_torchvision_operators()  # before transformers looks for torchvision
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from model_providers.qwen3.tiny import tiny
    from scripts.make_tiny_checkpoint import VOCAB_SIZE, make_tokenizer

    tokenizer = make_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int) and isinstance(pad, int)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny(VOCAB_SIZE), eos_token_id=end, pad_token_id=pad)).float()
    with torch.no_grad():
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        embedding[:, 0] = 30.0
        output[:, 0] = 0.0
        output[end] = 0.0
        output[end, 0] = -10.0
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(task: Task) -> None:
    """Problems of random letters whose chat-formatted prompts have `prompt_tokens` tokens, a new one for every prompt
    of every step."""
    from scripts.make_tiny_checkpoint import make_tokenizer

    tokenizer, letters = make_tokenizer(), random.Random(0)
    length = task.prompt_tokens - len(prompt_ids(tokenizer, ""))
    if length < 1:
        least = task.prompt_tokens - length + 1
        raise ValueError(
            f"--prompt-tokens {task.prompt_tokens}: the chat template takes {least - 1}; use {least} or more"
        )
    count = task.num_steps * task.num_prompts
    problems = ("".join(letters.choices(string.ascii_letters, k=length)) for _ in range(count))
    task.rows.write_text("".join(json.dumps({"problem": problem, "answer": "-"}) + "\n" for problem in problems))


def prompt_ids(tokenizer: Any, problem: str) -> list[int]:
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def even_share(response: Sequence[int]) -> float:
    """The reward: the share of even tokens, which nearly always differs between two samples."""
    return sum(token % 2 == 0 for token in response) / len(response)


@dataclass(slots=True)
class Seen:
    """The prompts and responses that a side's reward function was shown in one step."""

    prompts: Sequence[Any] = ()
    responses: Sequence[Sequence[int]] = ()

    def counts(self, as_ids: Callable[[Any], Sequence[int]]) -> dict[str, Any]:
        """What was trained on, counted after the clock has stopped."""
        lengths = [len(response) for response in self.responses]
        prompts = [list(as_ids(prompt)) for prompt in self.prompts]
        return {
            "samples": len(lengths),
            "response_tokens": sum(lengths),
            "response_length_range": [min(lengths), max(lengths)],
            "prompt_length_range": [min(map(len, prompts)), max(map(len, prompts))],
            "prompts_digest": hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:16],
        }


def weight_change(before: Mapping[str, Tensor], after: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Did the update reach every tensor, and how far did it move them?"""
    moved = {name: float((tensor.detach() - before[name]).abs().max()) for name, tensor in after}
    return {
        "tensors": len(moved),
        "tensors_changed": sum(change > 0 for change in moved.values()),
        "largest_change": max(moved.values()),
    }


class Clock:
    """Seconds by the wall, and those that all threads of this process ran: the others of a shared machine weigh less in
    the latter."""

    def __init__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._start, "cpu_seconds": time.process_time() - self._cpu_start}


class Channel:
    """The child's end of the pipes to step.py: a step is made when a line comes in, its record goes back as JSON.

    What libraries print goes to the log that is this process's stderr.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, record: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()

    def ready(self, **facts: Any) -> None:
        import torch

        self.send({"num_threads": torch.get_num_threads(), **facts})

    def wait_for_turn(self) -> None:
        """Returns when it is this side's turn; leaves the process when there is nobody left to report to."""
        if not sys.stdin.readline():
            raise SystemExit("step.py has gone")

    def report(self, times: Mapping[str, float], **facts: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.send({**times, "peak_resident_bytes": peak, **facts})
