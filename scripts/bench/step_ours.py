# SPDX-License-Identifier: Apache-2.0
"""Our side of scripts/bench/step.py: the parts of `megatron_rl.train`, stepped one turn at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from megatron_rl.config.checks import check
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rl.types import Completion, Prompt
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
    weight_change,
)

MICROBATCH_TOKENS = 16_384


def config(task: Task) -> RlConfig:
    longest = task.prompt_tokens + task.response_tokens
    return RlConfig(
        run_dir=str(task.out),
        device="cpu",
        model=ModelConfig(hf=str(task.model), dtype="float32"),
        data=DataConfig(train=str(task.rows), max_prompt_tokens=task.prompt_tokens, shuffle=False),
        rollout=RolloutConfig(
            num_samples=task.num_samples,
            temperature=TEMPERATURE,
            max_response_tokens=task.response_tokens,
            max_num_seqs=task.samples_per_step,
            kv_cache_gib=0.5,  # as TRL is given
            enforce_eager=True,
        ),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        reward=RewardConfig(name="exact"),  # replaced below by the one that both sides share
        train=TrainConfig(
            num_steps=task.num_steps,
            prompts_per_step=task.num_prompts,
            max_tokens_per_microbatch=max(MICROBATCH_TOKENS, longest),
            optimizer=OptimizerConfig(lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, weight_decay=0.0),
        ),
        checkpoint=CheckpointConfig(save_at_end=False),
        log=LogConfig(wandb="off", tensorboard=False),
    )


def run(task: Task, channel: Channel) -> None:
    from megatron_rl.loop import rl_step
    from megatron_rl.rewards.registry import UserReward
    from megatron_rl.rl_session import build_source, open_colocated
    from megatron_rl.session import build_learner, build_loader, open_session

    cfg = config(task)
    check(cfg, 1, "rl")
    seen = Seen()

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float]]:
        seen.prompts, seen.responses = prompts, [c.token_ids for c in completions]
        return [{"overall": even_share(response)} for response in seen.responses]

    with ExitStack() as stack:
        session = stack.enter_context(open_session(cfg, cfg.rollout.temperature))
        learner = build_learner(cfg, session)
        colocated = stack.enter_context(open_colocated(cfg, session, learner, UserReward("even_share", reward)))
        source = build_source(cfg, session, colocated, build_loader(cfg, session.quarantine))
        weights = session.policy.language_model.named_weights()
        channel.ready()
        for step in range(task.num_steps):
            before = {name: weight.detach().clone() for name, weight in weights.items()}
            channel.wait_for_turn()
            clock = Clock()
            metrics = rl_step(source, learner, session.quarantine, step)
            times = clock.read()
            phases = session.run_state.progress.end_step(step)
            phases.pop("timing_s/step")  # it includes the other sides' turns
            channel.report(
                times,
                phases=phases,
                logprob_gap_max=metrics["rollout/logprob_gap_max"],
                reward=metrics["critic/score/mean"],
                **seen.counts(lambda prompt: prompt.token_ids),
                **weight_change(before, weights.items()),
            )
