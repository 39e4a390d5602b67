# SPDX-License-Identifier: Apache-2.0
"""The next batch, prepared while the engine generates with this one: prompts built, their frames being decoded."""

from __future__ import annotations

from collections.abc import Sequence

from data.rows.prompts import PromptBuilder
from megatron_rl.errors import BadSample
from megatron_rl.observe.quarantine import Quarantine
from megatron_rl.protocols import StepEncoder
from megatron_rl.runtime.parallel import ParallelMesh, gather_lists
from megatron_rl.types import BadRow, Prompt, Row

Pairs = Sequence[tuple[int, Row]]
Built = tuple[list[Prompt], list[BadRow]]


class PromptPrefetcher:
    """Rows -> prompts whose media are encoded; holds at most one prepared batch. Every method is collective."""

    def __init__(self, builder: PromptBuilder, mesh: ParallelMesh, encoder: StepEncoder, quarantine: Quarantine):
        self._builder, self._mesh, self._encoder, self._quarantine = builder, mesh, encoder, quarantine
        self._pairs: list[tuple[int, Row]] = []
        self._built: Built = ([], [])

    def prepare(self, pairs: Pairs) -> None:
        """Build the prompts of a batch to come and begin to decode this rank's share of its frames."""
        self._pairs, self._built = list(pairs), build_prompts(pairs, self._builder, self._mesh)
        self._encoder.prefetch([item for prompt in self._built[0] for item in prompt.media])

    def take(self, pairs: Pairs) -> Built:
        """The prompts of a batch, prepared or not."""
        if self._pairs != list(pairs):
            return build_prompts(pairs, self._builder, self._mesh)
        self._pairs = []
        return self._built

    def encoded(self, pairs: Pairs, where: str, encoder: StepEncoder | None = None) -> list[Prompt]:
        """Prompts whose media are encoded, by `encoder` if another one is given. Rows that cannot be used are set aside
        and counted; `where` names the batch in messages."""
        prompts, bad_rows = self.take(pairs)
        prompts, bad_media = encode_media(prompts, self._encoder if encoder is None else encoder)
        self._quarantine.add([*bad_rows, *bad_media], len(pairs), where)
        return prompts


def build_prompts(
    pairs: Sequence[tuple[int, Row]], builder: PromptBuilder, mesh: ParallelMesh
) -> tuple[list[Prompt], list[BadRow]]:
    """Every rank probes and tokenizes its share; all get all, in the order of `pairs`. Collective."""
    mine: list[tuple[int, Prompt | BadRow]] = []
    for index in range(mesh.rank, len(pairs), mesh.world):
        prompt_id, row = pairs[index]
        try:
            mine.append((index, builder.build(prompt_id, row)))
        except BadSample as error:
            mine.append((index, BadRow(row.source, f"{error.source}: {error.reason}", error.kind)))
    built = [item for _, item in sorted(gather_lists(mine), key=lambda pair: pair[0])]
    return [p for p in built if isinstance(p, Prompt)], [b for b in built if isinstance(b, BadRow)]


def encode_media(prompts: Sequence[Prompt], encoder: StepEncoder) -> tuple[list[Prompt], list[BadRow]]:
    """Encode every medium of the batch; prompts with one that turned out faulty come back as bad rows. Collective."""
    failed = encoder.encode([item for prompt in prompts for item in prompt.media])
    good, bad = [], []
    for prompt in prompts:
        reasons = [f"{item.path}: {failed[item.key]}" for item in prompt.media if item.key in failed]
        if reasons:
            bad.append(BadRow(prompt.row.source, "; ".join(reasons), "media"))
        else:
            good.append(prompt)
    return good, bad
