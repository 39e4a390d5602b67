# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning from a recipe: `scripts/launch.sh megatron_rl.train RECIPE.yaml key.path=value ...`.

Composes the parts, runs the steps, leaves a summary. The algorithm itself is in megatron_rl/loop.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rl.config.command_line import run_job
from megatron_rl.config.schema import AlgorithmConfig, RlConfig

if TYPE_CHECKING:
    from megatron_rl.evaluate import Evaluation
    from megatron_rl.loop import Rollout
    from megatron_rl.protocols import PolicyLoss
    from megatron_rl.run_state import RunState
    from megatron_rl.session import Session


def main(argv: Sequence[str]) -> None:
    run_job(
        argv, RlConfig, "python -m megatron_rl.train", "Reinforcement learning on text and video (GRPO, DAPO).", run
    )


def run(cfg: RlConfig) -> None:
    """The whole job on this rank."""
    from megatron_rl.session import open_session

    with open_session(cfg, cfg.rollout.temperature) as session:
        run_session(session)


def run_session(session: Session[RlConfig]) -> None:
    from megatron_rl.evaluate import Evaluation
    from megatron_rl.loop import replay_step, rl_step
    from megatron_rl.rollout.store import RolloutStore
    from megatron_rl.run_state import RunState
    from megatron_rl.session import open_loader, read_eval_rows
    from megatron_rl.training.policy import Reference

    cfg = session.cfg
    loss = build_loss(cfg.algorithm)
    reference = Reference(session.policy) if cfg.algorithm.kl_coef else None  # before a resume: the starting weights
    folder = cfg.rollout.replay_from or cfg.rollout.save_to
    store = RolloutStore(folder, writes=session.mesh.rank == 0) if folder else None
    replaying = bool(cfg.rollout.replay_from)
    rollout = None if replaying else build_rollout(session)
    loader = None if replaying else open_loader(session)
    run_state = RunState(session, loader)
    evaluation = Evaluation(session, rollout, read_eval_rows(session))
    start = run_state.resume()
    if start == 0:
        run_state.pending |= evaluation.at_start()
    for step in range(start, cfg.train.num_steps):
        if replaying:
            metrics = replay_step(session, loss, reference, store, step)
        else:
            metrics = rl_step(session, rollout, loader, loss, reference, store, step)
        metrics |= evaluation.after_step(step)
        run_state.end_step(step, metrics, note=f"reward {metrics.get('critic/score/mean', float('nan')):.3f}")
        if run_state.stopped:
            break
    else:
        finish(run_state, evaluation)
    if rollout is not None:
        rollout.engine.close()


def build_loss(algorithm: AlgorithmConfig) -> PolicyLoss:
    from megatron_rl.algorithms.losses import LOSSES

    return LOSSES[algorithm.loss](
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        clip_dual=algorithm.clip_dual,
        kl_coef=algorithm.kl_coef,
        kl_kind=algorithm.kl_kind,
    )


def build_rollout(session: Session[RlConfig]) -> Rollout:
    from megatron_rl.loop import Rollout
    from megatron_rl.rewards.registry import load_reward
    from megatron_rl.session import open_engine

    reward = load_reward(session.cfg.reward.name, session.cfg.reward.terms)
    with session.policy.offloaded():  # the engine measures what memory is left for it
        engine, resharder = open_engine(session)
    return Rollout(engine, resharder, reward)


def finish(run_state: RunState, evaluation: Evaluation) -> None:
    """Export, then summary.json, the curves and a few sample answers."""
    from megatron_rl.evaluate import sample_rollouts
    from megatron_rl.run_state import first, highest, last

    cfg = run_state.session.cfg
    hf_export = run_state.export_hf()
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
