# SPDX-License-Identifier: Apache-2.0
"""TRL's side of bench_step.py: its `GRPOTrainer`, stepped one turn at a time by a callback.

Everything that TRL can leave out on a CPU is left out: no reference model, no gradient checkpointing, no bf16 casts, no
padding, no logging, no saving.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench_step_task import (
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TEMPERATURE,
    Channel,
    Seen,
    Task,
    even_share,
    now,
    prompt_ids,
    weight_change,
)

from megatron_rl.device import define_torchvision_operators

define_torchvision_operators()  # before transformers looks for torchvision


@dataclass(frozen=True, slots=True)
class Variant:
    """How TRL is set up. `batch` samples go through the model together; the rest is gradient accumulation."""

    label: str
    batch: int
    vllm: bool = False


VARIANTS = {
    "trl_64": Variant("TRL, transformers generate, batch 64", 64),
    "trl_8": Variant("TRL, transformers generate, batch 8 x 8 accumulated", 8),
    "trl_vllm": Variant("TRL, vLLM colocate, batch 64", 64, vllm=True),
}


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


def run(task: Task, channel: Channel) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    seen = Seen()

    def reward(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **unused: Any) -> list[float]:
        seen.prompts, seen.responses = prompts, completion_ids
        return [even_share(response) for response in completion_ids]

    class Turns(TrainerCallback):
        """Makes a step wait for its turn, and reports it."""

        def on_step_begin(self, *unused: Any, **parts: Any) -> None:
            self.before = {name: weight.detach().clone() for name, weight in parts["model"].named_parameters()}
            channel.wait_for_turn()
            self.start = now()

        def on_step_end(self, *unused: Any, **parts: Any) -> None:
            seconds = now() - self.start
            tokenizer = parts["processing_class"]
            counts = seen.counts(lambda messages: prompt_ids(tokenizer, messages[0]["content"]))
            channel.report(seconds, **counts, **weight_change(self.before, parts["model"].named_parameters()))

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
