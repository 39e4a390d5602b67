# SPDX-License-Identifier: Apache-2.0
"""What a forward pass keeps for the backward, as the sum of live tensor storages, not as memory of the process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.training.batch import pack
from megatron_rl.types import TrainSample
from scripts.bench.baselines import LiveBytes
from tests import tiny_policy as tp
from tests.world import run_world

NUM_TOKENS = 16_384
NUM_RESPONSES = 4
LIMIT = 1.15


def one_group(provider: Any, num_prompt: int, num_response: int) -> list[TrainSample]:
    """A video prompt and its responses, `num_prompt` + NUM_RESPONSES * `num_response` tokens."""
    clip = tp.video("long", ((num_prompt - 32) // 16, 8, 8))
    first = tp.sample(provider, 1, num_prompt - clip.num_tokens - 2, num_response, [clip])
    others = [tp.sample(provider, i, 1, num_response) for i in range(1, NUM_RESPONSES)]
    return [first, *(replace(other, prompt=first.prompt) for other in others)]


def kept_after_forward(
    rank: int, folder: Path, context: int, comm: str, num_prompt: int, num_response: int, recompute: str = "none"
) -> int:
    """Bytes alive at the end of the forward that were not before it, on this rank."""
    trainer = tp.open_trainer(folder, tp.join(context=context, comm=comm), tp.MEASURE, recompute=recompute)
    samples = one_group(trainer.provider, num_prompt, num_response)
    [batch] = pack([samples], 1, 2 * NUM_TOKENS, trainer.provider, trainer.mesh)[0].batches
    layout = trainer.policy._layout(batch, tp.random_embeds(samples))
    with trainer.policy.backend.mcore_scope(), LiveBytes() as memory:
        output = trainer.policy.language_model(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[:, None],
            attention_mask=None,
            packed_seq_params=layout,
        )
        kept = memory.live
    assert output.requires_grad
    return kept


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> int:
    return _measure(tiny_checkpoint, 1, "all_gather")[0]


def _measure(folder: Path, context: int, comm: str) -> list[int]:
    num_prompt = NUM_TOKENS - NUM_RESPONSES * 64
    return run_world(context, kept_after_forward, folder, context, comm, num_prompt, 64, timeout=400)


@pytest.mark.parametrize(("context", "comm"), [(2, "all_gather"), (4, "p2p"), (4, "all_gather"), (4, "a2a")])
def test_context_parallel_ranks_keep_their_share(tiny_checkpoint: Path, whole: int, context: int, comm: str) -> None:
    shares = [kept / whole * context for kept in _measure(tiny_checkpoint, context, comm)]
    assert max(shares) <= LIMIT, f"each of {context} ranks keeps {shares} times its share of {whole / 1e6:.0f} MB"


def test_logits_are_not_kept(tiny_checkpoint: Path, wide_checkpoint: Path) -> None:
    """A token of a prompt, or of a response, keeps what it would keep with a vocabulary fifteen times as large."""
    for more in ((2048, 8), (1024, 264)):
        grown = [
            _kept_alone(folder, *more) - _kept_alone(folder, 1024, 8) for folder in (tiny_checkpoint, wide_checkpoint)
        ]
        # A busy machine's gloo thread may still refer to two numbers a response token that it has summed.
        assert grown[0] == pytest.approx(grown[1], abs=2 * 4 * NUM_RESPONSES * 264) and grown[0] > 1e6


def _kept_alone(folder: Path, num_prompt: int, num_response: int) -> int:
    return run_world(1, kept_after_forward, folder, 1, "all_gather", num_prompt, num_response)[0]


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    config.get_text_config().vocab_size = 4096
    make_model(config, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("recompute", "most"), [("selective", 0.6), ("full", 0.15)])
def test_recomputation_keeps_less(tiny_checkpoint: Path, recompute: str, most: float) -> None:
    sizes = (tiny_checkpoint, 1, "all_gather", 2048, 64)
    everything = run_world(1, kept_after_forward, *sizes)[0]
    assert run_world(1, kept_after_forward, *sizes, recompute)[0] <= most * everything
