# SPDX-License-Identifier: Apache-2.0
"""The resharder's benchmark on a small model: its counts against numbers worked out by hand, and its two meters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.world import run_world

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN, FFN, VOCAB, KV, NUM_LAYERS = 256, 1024, 8192, 256, 4


def bytes_by_hand() -> tuple[int, int]:
    """(weights that tensor parallel ranks share out, one norm) in fp32."""
    attention = 2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + HIDDEN + 2 * KV
    return 4 * (NUM_LAYERS * (attention + 3 * HIDDEN * FFN) + 2 * VOCAB * HIDDEN), 4 * HIDDEN


@pytest.mark.full
def test_figures_of_a_small_model(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    script = str(ROOT / "scripts" / "bench" / "resharder.py")
    arguments = ["--json", str(out), "--megabytes", "1", "--buffer-mib", "1", "--repeat", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    variants = record["variants"]
    assert all(figures["bit_equal"] for figures in variants.values())
    shared, norm = bytes_by_hand()
    assert record["replica_bytes"] == shared + 2 * (2 * NUM_LAYERS + 1) * norm
    # Each stage lacks the other's norms; the last stage also has the final one. Of the rest, a rank of the trainer
    # holds a quarter, a rank of the engine needs a half.
    foreign_norms = [5 * norm, 5 * norm, 4 * norm, 4 * norm]
    minimum = [shared // 4 + norms for norms in foreign_norms]
    assert variants["ours"]["bytes_received"] == minimum
    assert variants["core_resharding"]["bytes_received"] == minimum
    for name in ("full_gather_per_tensor", "full_gather_bucketed"):
        assert variants[name]["bytes_received"] == [3 * shared // 4 + norms for norms in foreign_norms]
        assert round(variants[name]["bytes_ratio"], 2) == 3.00
    assert record["buffer_bound_respected"]
    assert 0 < variants["ours"]["peak_extra_bytes"] < variants["full_gather_bucketed"]["peak_extra_bytes"]
    assert "full gather per tensor" in done.stdout


def test_live_bytes_counts_what_was_allocated_inside_and_lives() -> None:
    from scripts.bench.baselines import LiveBytes

    before = torch.zeros(1_000_000)
    with LiveBytes() as memory:
        before.view(1000, 1000)[3].fill_(1.0)  # of a storage that was there
        first = torch.empty(1000)
        second = first.view(10, 100) + 1.0
        del first
        third = torch.empty(500)
        assert memory.live == second.nbytes + third.nbytes == 6000
    assert memory.peak == 8000


def _count_received(rank: int) -> int:
    from scripts.bench.baselines import ReceivedBytes

    dist.init_process_group("gloo")
    tensor = torch.full((10,), float(rank))
    with ReceivedBytes() as received:
        dist.broadcast(tensor, src=0)  # 40 bytes to rank 1
        dist.all_gather_into_tensor(torch.empty(20), tensor)  # 40 to each
        kind, peer = (dist.isend, 1) if rank == 0 else (dist.irecv, 0)
        for work in dist.batch_isend_irecv([dist.P2POp(kind, tensor[:5], peer)]):  # 20 to rank 1
            work.wait()
    return received.total


def test_received_bytes_counts_at_the_calls() -> None:
    assert run_world(2, _count_received) == [40, 100]


def _open_gloo_service(rank: int) -> bool:
    from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService

    from scripts.bench.baselines import gloo_service_without_stream

    dist.init_process_group("gloo")
    with pytest.raises(RuntimeError, match="Stream"):
        GlooCopyService()
    with gloo_service_without_stream():
        return isinstance(GlooCopyService(), GlooCopyService)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA stream can be opened here")
def test_megatrons_gloo_service_needs_a_stream_it_does_not_use() -> None:
    assert run_world(1, _open_gloo_service) == [True]
