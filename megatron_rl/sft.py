# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning from a recipe: `scripts/launch.sh megatron_rl.sft RECIPE.yaml key.path=value ...`.

The first stage of LongVILA-R1 (SFT, then RL), on the same policy, data and checkpoints as RL. The reference answer and
the end-of-turn token are learned; the prompt is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_rl.config.command_line import run_job
from megatron_rl.config.schema import SftConfig

if TYPE_CHECKING:
    from megatron_rl.session import Session
    from megatron_rl.types import Prompt, TrainSample


def main(argv: Sequence[str]) -> None:
    run_job(argv, SftConfig, "python -m megatron_rl.sft", "Supervised fine-tuning on text and video.", run)


def run(cfg: SftConfig) -> None:
    """The whole job on this rank."""
    from megatron_rl.session import open_session

    with open_session(cfg, temperature=1.0) as session:
        run_session(session)


def run_session(session: Session[SftConfig]) -> None:
    from megatron_rl.run_state import RunState, first, last
    from megatron_rl.session import open_loader

    cfg = session.cfg
    loader = open_loader(session)
    run_state = RunState(session, loader)
    for step in range(run_state.resume(), cfg.train.num_steps):
        pairs, upcoming = loader.next_batch(), loader.peek_batch() if step + 1 < cfg.train.num_steps else []
        metrics = sft_step(session, pairs, upcoming, step)
        run_state.end_step(step, metrics, note=f"nll {metrics.get('sft/nll', float('nan')):.3f}")
        if run_state.stopped:
            return
    hf_export = run_state.export_hf()
    nll = {"start_nll": first(cfg.run_dir, "sft/nll"), "end_nll": last(cfg.run_dir, "sft/nll")}
    run_state.close({**nll, "hf_export": hf_export}, [])


def sft_step(session: Session[SftConfig], pairs: Sequence, upcoming: Sequence, step: int) -> dict[str, float]:
    """One pass over a batch of rows in `updates_per_step` updates. Collective."""
    from megatron_rl.algorithms.losses import NllLoss
    from megatron_rl.loop import fetch_embeds, usable_prompts
    from megatron_rl.observe.step_metrics import Totals, vision_metrics
    from megatron_rl.training.batch import pack
    from megatron_rl.training.policy import ScoredBatch

    cfg, policy = session.cfg, session.policy
    session.vision.forget()
    with session.progress.phase(step, "encode"):
        prompts = usable_prompts(session, pairs, f"step {step}")
        if upcoming:
            session.ahead.prepare(upcoming)  # decoded while this batch is learned
    samples = reference_samples(session, prompts)
    updates = pack(
        samples,
        cfg.train.updates_per_step,
        cfg.train.max_tokens_per_microbatch,
        session.provider,
        session.mesh,
        cfg.train.loss_average,
        cfg.train.share_prefix,
    )
    updates, embeds = fetch_embeds(session, updates)
    totals = Totals()
    with session.progress.phase(step, "update_actor"):
        for batches, made in zip(updates, embeds, strict=True):
            scored = [ScoredBatch(b, None, None) for b in batches]
            now = session.vision.refreshed(made)
            totals.add(policy.train(scored, now.tables, NllLoss(), step, partial(session.vision.backward, now)))
    metrics = session.quarantine.metrics() | {
        "sft/num_samples": float(len(samples)),
        "sft/num_tokens": float(sum(len(s.response_ids) for group in samples for s in group)),
    }
    return totals.reduced() | metrics | vision_metrics(session.vision.take_counts())


def reference_samples(session: Session[SftConfig], prompts: Sequence[Prompt]) -> list[list[TrainSample]]:
    """Each prompt, its reference answer and the end-of-turn token; answers that are too long are set aside."""
    from megatron_rl.types import BadRow, TrainSample

    tokenizer, longest = session.tokenizer, session.cfg.train.max_answer_tokens
    samples, bad = [], []
    for prompt in prompts:
        answer = tokenizer.encode(prompt.row.answer, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(answer) > longest:
            reason = f"answer of {len(answer)} tokens is over train.max_answer_tokens={longest}"
            bad.append(BadRow(prompt.row.source, reason, "overlong"))
        else:
            samples.append([TrainSample(prompt, tuple(answer), advantage=0.0, rollout_logprobs=(0.0,) * len(answer))])
    session.quarantine.add(bad, len(prompts), "a batch of reference answers")
    return samples


if __name__ == "__main__":
    main(sys.argv[1:])
