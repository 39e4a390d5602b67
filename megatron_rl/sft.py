# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning from a recipe: `scripts/launch.sh megatron_rl.sft RECIPE.yaml key.path=value ...`.

The first stage of LongVILA-R1 (SFT, then RL), on the same policy, data and checkpoints as RL. The reference answer and
the end-of-turn token are learned; the prompt is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_rl.config.command_line import run_job
from megatron_rl.config.schema import SftConfig
from megatron_rl.reading.command_line import check_data


def main(argv: Sequence[str]) -> None:
    run_job(argv, SftConfig, "python -m megatron_rl.sft", "Supervised fine-tuning on text and video.", run, check_data)


def run(cfg: SftConfig) -> None:
    """The whole job on this rank."""
    from megatron_rl.observe.step_metrics import media_metrics
    from megatron_rl.run_state import first, last
    from megatron_rl.session import build_answer_learner, build_answers, build_loader, open_session

    with open_session(cfg, temperature=1.0) as session:
        run_state = session.run_state
        with run_state.progress.starting("rows"):
            loader = build_loader(cfg, session.quarantine)
        learner, answers = build_answer_learner(cfg, session), build_answers(cfg, session, loader)
        start = run_state.resume(loader)
        if run_state.leaves_before(start):
            return
        run_state.pending |= run_state.progress.begin_steps()
        for step in range(start, cfg.train.num_steps):
            metrics = learner.learn_answers(answers.next_batch(step), step)
            metrics |= session.quarantine.metrics() | media_metrics(session.encoder.take_counts())
            run_state.end_step(step, metrics, note=f"nll {metrics.get('sft/nll', float('nan')):.3f}")
            if run_state.stopped:
                return
        hf_export = run_state.export_hf() if cfg.checkpoint.export_hf else ""
        nll = {"start_nll": first(cfg.run_dir, "sft/nll"), "end_nll": last(cfg.run_dir, "sft/nll")}
        run_state.close({**nll, "hf_export": hf_export}, [])


if __name__ == "__main__":
    main(sys.argv[1:])
