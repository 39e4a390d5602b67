# SPDX-License-Identifier: Apache-2.0
"""Rollout batches on disk, one JSON line per group: readable, replayable without an engine.

`token_ids` of a prompt are written as runs: `[151656, 4096], 198` is 4096 times the one, then the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_rl.runtime.files import write_atomically
from megatron_rl.types import Completion, Group, MediaItem, Prompt, Row, Scored


class RolloutStore:
    """A folder of `step_N.jsonl`. Only the rank that `writes` touches the disk on save."""

    def __init__(self, folder: str | Path, writes: bool):
        self.folder = Path(folder)
        self._writes = writes

    def save(self, step: int, groups: Sequence[Group]) -> None:
        if not self._writes:
            return
        lines = "".join(json.dumps(_line(g), ensure_ascii=False) + "\n" for g in groups)
        write_atomically(self._path(step), lines.encode())

    def load(self, step: int) -> list[Group]:
        path = self._path(step)
        if not path.is_file():
            raise ValueError(f"rollout.replay_from={self.folder}: has no {path.name}; lower train.num_steps")
        with path.open(encoding="utf-8") as file:  # not splitlines(): a text may hold U+2028
            return [self._read(line, path.name, number) for number, line in enumerate(file, 1)]

    def _read(self, line: str, name: str, number: int) -> Group:
        try:
            data = json.loads(line)
            if not data["prompt"].get("videos"):
                return _group(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"rollout.replay_from={self.folder}: {name}: line {number} is no saved group "
                f"({type(error).__name__}: {error}); restore the file or sample again"
            ) from error
        raise ValueError(
            f"rollout.replay_from={self.folder}: {name} is of an older version, which did not write where the tokens "
            "of media stand; sample again"
        )

    def check_learnable(self, step: int, groups: Sequence[Group]) -> None:
        """Raise where there is nothing to compare: no group, or a group of one response."""
        alone = sum(len(group.scored) < 2 for group in groups)
        if groups and not alone:
            return
        what = f"holds {alone} of {len(groups)} prompts with a single response" if groups else "holds no prompts"
        raise ValueError(
            f"rollout.replay_from={self.folder}: {self._path(step).name} {what}, and an advantage compares the "
            "responses of a prompt; sample again with rollout.num_samples of 2 or more"
        )

    def check_unchanged(self, groups: Sequence[Group], prompts: Sequence[Prompt]) -> None:
        """Raise when today's data makes other prompts than those the responses were sampled from."""
        rebuilt = {p.prompt_id: p for p in prompts}
        changed = [g.prompt.row.source for g in groups if rebuilt.get(g.prompt.prompt_id) != g.prompt]
        if changed:
            raise ValueError(
                f"rollout.replay_from={self.folder}: the media or data settings behind {len(changed)} prompts are not "
                f"those of the saved rollouts ({', '.join(changed[:5])} ...); restore them or sample again"
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}.jsonl"


def _line(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "prompt": {
            "prompt_id": prompt.prompt_id,
            "row": asdict(prompt.row),
            "token_ids": _runs(prompt.token_ids),
            "media": [asdict(item) for item in prompt.media],
            "spans": prompt.spans,
        },
        "scored": [asdict(scored) for scored in group.scored],
    }


def _runs(token_ids: Sequence[int]) -> list[int | list[int]]:
    """A token by itself as it is, several equal ones as [token, count]."""
    runs = [(token, sum(1 for _ in equal)) for token, equal in groupby(token_ids)]
    return [token if count == 1 else [token, count] for token, count in runs]


def _tokens(runs: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    parts = [(run,) if isinstance(run, int) else (run[0],) * run[1] for run in runs]
    return tuple(token for part in parts for token in part)


def _group(data: dict[str, Any]) -> Group:
    return Group(_prompt(data["prompt"]), tuple(_scored(s) for s in data["scored"]))


def _prompt(data: dict[str, Any]) -> Prompt:
    row = Row(**{k: _tuples(v) for k, v in data["row"].items()})
    media = tuple(MediaItem(**{k: _tuples(v) for k, v in item.items()}) for item in data.get("media", ()))
    spans = tuple(tuple((start, stop) for start, stop in runs) for runs in data.get("spans", ()))
    return Prompt(data["prompt_id"], row, _tokens(data["token_ids"]), media, spans)


def _scored(data: dict[str, Any]) -> Scored:
    completion = Completion(**{k: _tuples(v) for k, v in data["completion"].items()})
    return Scored(completion, data["reward"], data["parts"], data.get("notes", {}))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
