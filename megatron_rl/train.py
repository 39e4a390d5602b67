# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning from a recipe: `scripts/launch.sh megatron_rl.train RECIPE.yaml key.path=value ...`.

Runs the steps and leaves a summary. The algorithm itself is in loop.py; session.py and rl_session.py build the parts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_rl.config.command_line import run_job
from megatron_rl.config.schema import RlConfig
from megatron_rl.reading.command_line import check_data

if TYPE_CHECKING:
    from megatron_rl.evaluate import Evaluation
    from megatron_rl.run_state import RunState


def main(argv: Sequence[str]) -> None:
    summary = "Reinforcement learning on text and video (GRPO, DAPO)."
    run_job(argv, RlConfig, "python -m megatron_rl.train", summary, run, check_data)


def run(cfg: RlConfig) -> None:
    """The whole job on this rank."""
    from megatron_rl.loop import rl_step, sample_step
    from megatron_rl.observe.step_metrics import media_metrics
    from megatron_rl.rewards.registry import open_reward
    from megatron_rl.rl_session import build_evaluation, build_source, open_colocated
    from megatron_rl.session import build_learner, build_loader, open_session

    with ExitStack() as stack:
        session = stack.enter_context(open_session(cfg, cfg.rollout.temperature))
        run_state, learner = session.run_state, build_learner(cfg, session)
        loader = colocated = None
        if not cfg.rollout.replay_from:
            scoring = cfg.reward
            reward = stack.enter_context(open_reward(scoring.name, scoring.terms, scoring.missing_answer))
            with run_state.progress.starting("engine"):
                colocated = stack.enter_context(open_colocated(cfg, session, learner, reward))
            with run_state.progress.starting("rows"):
                loader = build_loader(cfg, session.quarantine)
        source = build_source(cfg, session, colocated, loader)
        with run_state.progress.starting("rows"):
            evaluation = build_evaluation(cfg, session, colocated)
        start = run_state.resume(loader)
        if run_state.leaves_before(start):
            return
        if start == 0:
            run_state.pending |= evaluation.at_start()
        elif run_state.owes_evaluation:
            run_state.make_up(start - 1, evaluation.after_step(start - 1))
        run_state.pending |= run_state.progress.begin_steps()
        for step in range(start, cfg.train.num_steps):
            if cfg.rollout.only:
                _, metrics = sample_step(source, session.quarantine, step)
            else:
                metrics = rl_step(source, learner, session.quarantine, step)
            metrics |= media_metrics(session.encoder.take_counts())
            if run_state.asked_to_stop(step):
                run_state.owes_evaluation = evaluation.is_due(step)
            else:
                metrics |= evaluation.after_step(step)
            run_state.end_step(step, metrics, note=f"reward {metrics.get('critic/score/mean', float('nan')):.3f}")
            if run_state.stopped:
                return
        finish(cfg, run_state, evaluation)


def finish(cfg: RlConfig, run_state: RunState, evaluation: Evaluation) -> None:
    """Export, then summary.json, the curves and a few sample answers."""
    from megatron_rl.evaluate import sample_rollouts
    from megatron_rl.run_state import first, highest, last

    hf_export = run_state.export_hf() if cfg.checkpoint.export_hf else ""
    summary = {
        "start_accuracy": first(cfg.run_dir, "eval/start_accuracy"),
        "heldout_accuracy": last(cfg.run_dir, "eval/accuracy"),
        "blind_accuracy": last(cfg.run_dir, "eval/blind_accuracy"),
        "num_heldout": last(cfg.run_dir, "eval/num_prompts"),
        "max_logprob_gap": highest(cfg.run_dir, "rollout/logprob_gap_max"),
        "sync_bytes_over_minimum": highest(cfg.run_dir, "sync/bytes_over_minimum"),
        "hf_export": hf_export,
    }
    run_state.close(summary, sample_rollouts(evaluation.groups, cfg.eval.show))


if __name__ == "__main__":
    main(sys.argv[1:])
