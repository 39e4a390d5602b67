# SPDX-License-Identifier: Apache-2.0
"""TRL's side of step.py: its `GRPOTrainer`, stepped one turn at a time by a callback.

Everything that TRL can leave out is left out: reference model, gradient checkpointing, padding, logging, saving.
transformers' continuous batching, another of its ways to generate, was tried and is no variant: on a CPU a step of 200
prompt tokens took some 15 times as long as with `generate`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.runtime.device import define_torchvision_operators
from scripts.bench.step_task import (
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TEMPERATURE,
    Channel,
    Clock,
    Seen,
    Task,
    even_share,
    prompt_ids,
    weight_change,
)

define_torchvision_operators()  # before transformers looks for torchvision


@dataclass(frozen=True, slots=True)
class Variant:
    """How TRL is set up: `batch` samples go through the model together, the rest is gradient accumulation."""

    batch: int
    vllm: bool = False


VARIANTS = {
    "trl_64": Variant(64),
    "trl_16": Variant(16),
    "trl_vllm_64": Variant(64, vllm=True),
    "trl_vllm_16": Variant(16, vllm=True),
}
KV_CACHE_BYTES = 512 << 20


def config(task: Task, variant: Variant) -> Any:
    from trl import GRPOConfig

    batch = min(variant.batch, task.samples_per_step)
    engine: dict[str, Any] = {}
    if variant.vllm:
        engine = {"vllm_mode": "colocate", "vllm_max_model_length": task.prompt_tokens + task.response_tokens}
    return GRPOConfig(
        output_dir=str(task.out),
        use_cpu=True,
        bf16=False,
        seed=1,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        disable_dropout=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=task.samples_per_step // batch,
        num_generations=task.num_samples,
        num_iterations=1,
        max_completion_length=task.response_tokens,
        temperature=TEMPERATURE,
        beta=0.0,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        max_steps=task.num_steps,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        use_vllm=variant.vllm,
        **engine,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def help_vllm_on_a_cpu() -> None:
    """What TRL's colocated vLLM lacks on a CPU, given to it as our engine has it.

    Without the first, TRL's weight sync fails: "'Parameter' object has no attribute 'weight_loader'", for vLLM on a CPU
    packs the linear weights away. Without the rest, vLLM takes bfloat16 for a float32 model, compiles, and takes a
    third of the memory.
    """
    from trl.generation import vllm_generation

    from megatron_rl.rollout.vllm_adaptations import keep_cpu_linear_weights

    keep_cpu_linear_weights()
    vllm_generation.LLM = functools.partial(
        vllm_generation.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=KV_CACHE_BYTES
    )


def run(task: Task, channel: Channel) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    if VARIANTS[task.side].vllm:
        help_vllm_on_a_cpu()
    seen = Seen()

    def reward(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **unused: Any) -> list[float]:
        seen.prompts, seen.responses = prompts, completion_ids
        return [even_share(response) for response in completion_ids]

    class Turns(TrainerCallback):
        """Makes a step wait for its turn, and reports it."""

        def on_step_begin(self, *unused: Any, **parts: Any) -> None:
            self.before = {name: weight.detach().clone() for name, weight in parts["model"].named_parameters()}
            channel.wait_for_turn()
            self.clock = Clock()

        def on_step_end(self, *unused: Any, **parts: Any) -> None:
            times = self.clock.read()
            tokenizer = parts["processing_class"]
            counts = seen.counts(lambda messages: prompt_ids(tokenizer, messages[0]["content"]))
            channel.report(times, **counts, **weight_change(self.before, parts["model"].named_parameters()))

    problems = [json.loads(line)["problem"] for line in task.rows.read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": problem}]} for problem in problems]
    trainer = GRPOTrainer(
        model=str(task.model),
        reward_funcs=reward,
        args=config(task, VARIANTS[task.side]),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Turns()],
    )
    channel.ready()
    trainer.train()
