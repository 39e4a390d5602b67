# SPDX-License-Identifier: Apache-2.0
"""Keys that were renamed, and keys of another job: what to write instead. Nothing is read under an old name."""

from __future__ import annotations

from megatron_rl.config.schema import RlConfig, SftConfig

_NOT_IN_SFT = {
    "rollout": "SFT has no rollouts",
    "algorithm": "SFT has no advantages and no policy loss",
    "reward": "SFT has no reward",
    "eval": "SFT generates no answers to evaluate",
}
_RENAMED: dict[type, dict[str, str]] = {
    SftConfig: {
        "rollout.max_response_tokens": f"{_NOT_IN_SFT['rollout']}; use train.max_answer_tokens",
        "algorithm.loss_average": f"{_NOT_IN_SFT['algorithm']}; use train.loss_average",
    },
    RlConfig: {
        "train.max_answer_tokens": "is a key of SFT; RL has rollout.max_response_tokens",
        "train.loss_average": "is a key of SFT; RL has algorithm.loss_average",
    },
}


def is_section_of_another_job(job: type, path: str) -> bool:
    return job is SftConfig and path in _NOT_IN_SFT


def advice_for(job: type, path: str, value: object) -> str | None:
    """Why the job's schema does not have this key, and what to write; None where it never had it."""
    if path in _RENAMED.get(job, {}):
        return _RENAMED[job][path]
    section = path.split(".")[0]
    if is_section_of_another_job(job, section):
        return f"{_NOT_IN_SFT[section]}; remove it"
    if path == "reward.format_weight":
        return f"is not a key any more; {_terms_for(value)}"
    return None


def _terms_for(format_weight: object) -> str:
    if isinstance(format_weight, (int, float)) and not isinstance(format_weight, bool) and format_weight != 0.1:
        terms = f"{{accuracy: {1 - format_weight:g}, format: {format_weight:g}}}"
        return f"write reward.terms: {terms}, or nothing for a reward without a format part"
    return "leave it out for the default, reward.terms: {accuracy: 0.9, format: 0.1}"
