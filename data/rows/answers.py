# SPDX-License-Identifier: Apache-2.0
"""Row -> the tokens of its answer, as SFT learns them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.rows.prompts import control_tokens, refuse_control_tokens
from megatron_rl.errors import BadSample
from megatron_rl.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerEncoder:
    """Encodes answers as they are, the end-of-turn token behind them. `max_tokens` bounds both together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._control_tokens = control_tokens(tokenizer)

    def __call__(self, row: Row) -> tuple[int, ...]:
        """Token ids. Raises BadSample for an answer that is too long, or holds tokens that are no text: a placeholder
        of a medium would be learned as one."""
        refuse_control_tokens(row.source, row.answer, "the answer", self._control_tokens)
        ids = (*self._tokenizer.encode(row.answer, add_special_tokens=False), self._tokenizer.eos_token_id)
        if len(ids) > self._max_tokens:
            reason = f"answer of {len(ids)} tokens is over train.max_answer_tokens={self._max_tokens}"
            raise BadSample(row.source, reason, "overlong")
        return ids
