# SPDX-License-Identifier: Apache-2.0
"""A plan for machines: the dictionary behind --json. Bytes, FLOPs, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_rl.planner.flops import step_flops
from megatron_rl.planner.long_rl import Claim
from megatron_rl.planner.search import FrameLimit, Knob, Option, reason
from megatron_rl.planner.times import ASSUMED
from megatron_rl.runtime.grid import Grid


def option_json(option: Option) -> dict[str, Any]:
    case = option.case
    return {
        "layout": _layout_json(case.trainer, case.engine),
        "recompute": option.cfg.model.recompute,
        "fits": option.memory.fits,
        "memory": {p.phase: {**p.items, "total": p.total, "stage": p.stage} for p in option.memory.phases},
        "capacity": option.memory.capacity,
        "host_per_rank": option.memory.host,
        "kv_tokens": option.memory.engine.kv_tokens,
        "sequences_together": option.memory.engine.num_sequences,
        "problems": list(option.memory.engine.problems),
        "predicted_seconds": {**option.times.phases, "step": option.times.step},
    }


def _layout_json(trainer: Grid, engine: Grid) -> dict[str, int]:
    names = ("world", "tensor", "pipeline", "virtual", "context", "expert")
    sizes = {name: getattr(trainer, name) for name in names}
    return {**sizes, "rollout_tensor": engine.tensor, "data": trainer.data}


def plan_json(
    option: Option, problems: Sequence[str], knobs: Sequence[Knob], options: Sequence[Option], limit: FrameLimit | None
) -> dict[str, Any]:
    case = option.case
    return {
        "model": {"name": case.model.name, "source": case.model.source},
        "gpu": asdict(case.gpu),
        "gpus": case.trainer.world,
        "work": asdict(case.work),
        "packing": asdict(case.packing) | {"rows_of_a_rank": case.rows},
        "parameters": {str(stage): case.params(stage).total for stage in range(case.trainer.pipeline)},
        "recipe": option_json(option),
        "problems": list(problems),
        "flops": asdict(step_flops(case)) | {"total": step_flops(case).total},
        "assumed_efficiency": asdict(ASSUMED),
        "knobs": [{"setting": k.setting, **option_json(k.option)} for k in knobs],
        "layouts": [
            {
                "layout": o.layout,
                "fits": o.memory.fits,
                "peak": o.memory.peak,
                "predicted_seconds": o.times.step,
                "why_not": "" if o.memory.fits else reason(o),
            }
            for o in options
        ],
        "largest_frames": limit and limit_json(limit),
    }


def limit_json(limit: FrameLimit) -> dict[str, Any]:
    found = limit.option
    return {
        "num_frames": limit.num_frames,
        "prompt_tokens": found.case.work.prompt_tokens if found else 0,
        "layout": found.layout if found else "",
        "stopped_by": limit.stopped_by,
    }


def claims_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [
        {
            "model": claim.title,
            "gpus": claim.gpus,
            "tokens_a_frame": claim.tokens_a_frame,
            "claim": {"num_frames": claim.num_frames, **option_json(claim.option)} if claim.option else None,
            "why_not": claim.why_not,
            "largest": limit_json(claim.limit),
        }
        for claim in claims
    ]
