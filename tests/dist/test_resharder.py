# SPDX-License-Identifier: Apache-2.0
"""Weight sync against vLLM's own loader, bit for bit, and its traffic against an oracle that knows no plan.

Every element of the checkpoint is given a number of its own (exact in fp32 up to 2**24). What vLLM's loader makes of it
on each rank says where every element belongs and which elements a rank needs; what Megatron's loader makes of it says
which it holds. The set difference is the least that has to travel.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.errors import WeightMismatch
from megatron_rl.protocols import ModelProvider
from megatron_rl.rl_session import build_engine
from megatron_rl.runtime import parallel
from megatron_rl.runtime.device import choose_backend
from megatron_rl.runtime.grid import Grid
from megatron_rl.runtime.parallel import ParallelMesh
from megatron_rl.session import open_session
from megatron_rl.types import SyncReport
from megatron_rl.weight_sync.plan import Holder, ReshardPlan, Transfer, build_plan
from megatron_rl.weight_sync.resharder import Resharder
from megatron_rl.weight_sync.shape_check import check_fit
from model_providers.hf_files import canonical_hf_name
from model_providers.provider import open_provider
from model_providers.weight_map import Block
from tests.rollout_parts import fill_with_hf_weights, open_plain_engine, small_config
from tests.world import run_world

pytestmark = pytest.mark.usefixtures("heavy_imports")

Params = dict[str, Tensor]
BACKEND = choose_backend("cpu", "float32")
SIZES = (1 << 30, 32 << 10)  # one round; many


def write_numbered(source: Path, target: Path, tied: bool) -> Path:
    """A copy of a checkpoint in which element k of the language model is the number k, from 1."""
    shutil.copytree(source, target)
    first, numbered = 1, {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        if canonical_hf_name(name) == "lm_head.weight" and tied:
            continue
        if not canonical_hf_name(name).startswith("visual."):
            tensor = torch.arange(first, first + tensor.numel(), dtype=torch.float32).view(tensor.shape)
            first += tensor.numel()
        numbered[name] = tensor
    assert first < 2**24
    save_file(numbered, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_odd(source: Path, folder: Path) -> Path:
    """Three layers and six heads, each with keys and values of its own: for layouts that powers of two never meet."""
    from scripts.make_tiny_checkpoint import make_config, make_model, make_tokenizer

    shutil.copytree(source, folder)
    config = make_config(make_tokenizer())
    text = config.get_text_config()
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 3, 6, 6
    text.hidden_size = config.vision_config.out_hidden_size = 192
    text.intermediate_size, text.layer_types = 384, text.layer_types[:1] * 3
    make_model(config, seed=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def numbered(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind of model: checkpoint folder}."""
    root = tmp_path_factory.mktemp("numbered")
    return {
        "plain": write_numbered(tiny_checkpoint, root / "plain", tied=False),
        "tied": write_numbered(tiny_checkpoint, root / "tied", tied=True),
        "odd": write_numbered(write_odd(tiny_checkpoint, root / "odd_source"), root / "odd", tied=False),
    }


def _vllm_params(rank: int, folder: Path, tensor: int) -> tuple[Params, Params]:
    """(start weights, what vLLM's loader makes of the checkpoint) of this rank."""
    engine = open_plain_engine(folder, tensor)
    start = {name: p.clone() for name, p in engine.parameters().items()}
    fill_with_hf_weights(engine, folder)
    return start, {name: p.clone() for name, p in engine.parameters().items()}


@pytest.fixture(scope="module")
def oracle(numbered: dict[str, Path]) -> Callable[[str, int], list[Params]]:
    """(kind of model, engine tp) -> parameters of each engine rank, from vLLM alone."""

    @functools.cache
    def load(kind: str, tensor: int) -> list[Params]:
        pairs = run_world(tensor, _vllm_params, numbered[kind], tensor, timeout=180)
        for start, final in pairs:
            assert not any(torch.equal(start[name], final[name]) for name in final if "norm" not in name)
        return [final for _, final in pairs]

    return load


@dataclass(frozen=True)
class Synced:
    """What an engine rank has after a sync, and what was counted on its wire."""

    engine: Params
    report: SyncReport
    received: int
    sent: int


def build_trainer(provider: ModelProvider, mesh: ParallelMesh) -> Params:
    """Live weights of this rank's trainer; none where it has no trainer."""
    if not mesh.trains:
        return {}
    model = provider.build_language(BACKEND, mesh)
    provider.load_language(model, mesh)
    return {name: p.data for name, p in model.named_weights().items()}


def _sync_into_noise(
    rank: int, folder: Path, trainer: Grid, engine: Grid, expected: list[Params], buffer_bytes: tuple[int, ...]
) -> tuple[Params, list[Synced]]:
    """(trainer weights, one sync per buffer size into random tensors of the engine's shapes)."""
    provider = open_provider(folder)
    mesh = parallel.initialize(BACKEND, trainer, engine)
    source = build_trainer(provider, mesh)
    serves = rank in engine.ranks
    shapes = {name: p.shape for name, p in expected[mesh.engine_tp_rank].items()} if serves else {}
    plan = build_plan(provider.weight_map, provider.shape.num_layers, trainer, engine)
    results = []
    for size in buffer_bytes:
        target = {name: torch.randn(shape) for name, shape in shapes.items()}
        check_fit(provider.weight_map, trainer, engine, rank, source, target)
        resharder = Resharder(plan, rank, source, target, size, dtype=torch.float32, link=mesh.link)
        with mock.patch.object(dist, "P2POp", side_effect=dist.P2POp) as operation:
            report = resharder.sync(version=3, verify=True)
        wire = [(call.args[0], call.args[1].nbytes) for call in operation.call_args_list]
        received = sum(count for kind, count in wire if kind is dist.irecv)
        sent = sum(count for kind, count in wire if kind is dist.isend)
        results.append(Synced(target, report, received, sent))
    return {name: p.clone() for name, p in source.items()}, results


def bytes_missing(engine: Params, trainer: Params) -> int:
    """Bytes of the elements that the engine rank needs and the trainer rank does not hold. Padding is number 0."""
    needed = {value for p in engine.values() for value in p.flatten().tolist()} - {0.0}
    return 4 * len(needed - {value for p in trainer.values() for value in p.flatten().tolist()})


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


LAYOUTS = [  # (world, trainer tp, trainer pp, engine tp, kind of model)
    (1, 1, 1, 1, "plain"),
    (2, 1, 1, 2, "plain"),
    (2, 1, 2, 1, "plain"),
    (2, 1, 2, 2, "plain"),
    (2, 2, 1, 1, "plain"),
    (2, 2, 1, 2, "plain"),
    (4, 1, 1, 2, "plain"),
    (4, 2, 2, 2, "plain"),
    (4, 4, 1, 1, "plain"),
    (4, 4, 1, 2, "plain"),
    (2, 2, 1, 2, "tied"),
    (2, 1, 2, 2, "tied"),
    (4, 2, 2, 2, "tied"),
    (4, 4, 1, 2, "tied"),
    (3, 3, 1, 1, "odd"),
    (3, 1, 3, 1, "odd"),
    (6, 3, 1, 2, "odd"),
    (6, 1, 3, 2, "odd"),
    (6, 2, 3, 2, "odd"),
]
FOUR_ENGINE_RANKS = [  # more ranks than KV heads: those are repeated
    (4, 1, 2, 4, "plain"),
    (4, 2, 1, 4, "plain"),
    (4, 2, 2, 4, "plain"),
    (4, 4, 1, 4, "plain"),
]


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "rollout_tensor", "kind"),
    LAYOUTS + [pytest.param(*layout, marks=pytest.mark.full) for layout in FOUR_ENGINE_RANKS],
)
def test_sync_gives_what_vllm_loads_and_moves_the_least(
    world: int, tensor: int, pipeline: int, rollout_tensor: int, kind: str, numbered, oracle
) -> None:
    grids = Grid(world, tensor=tensor, pipeline=pipeline), Grid(world, tensor=rollout_tensor)
    assert_least_is_moved(numbered[kind], *grids, oracle(kind, rollout_tensor))


def assert_least_is_moved(folder: Path, trainer: Grid, engine: Grid, expected: list[Params]) -> None:
    world = max(trainer.ranks.stop, engine.ranks.stop)
    ranks = run_world(world, _sync_into_noise, folder, trainer, engine, expected, SIZES, timeout=120)
    for rank, (held, results) in enumerate(ranks):
        wanted = expected[(rank - engine.first_rank) % len(expected)] if rank in engine.ranks else {}
        minimum = bytes_missing(wanted, held)
        for synced in results:
            assert_same(synced.engine, wanted)
            assert synced.received == synced.report.received == synced.report.minimum == minimum
            assert synced.sent == synced.report.sent
            assert synced.report.version == 3
    for results in zip(*(results for _, results in ranks), strict=True):
        assert sum(r.sent for r in results) == sum(r.received for r in results)


def test_context_parallel_ranks_hold_the_same_weights(numbered, oracle) -> None:
    assert_least_is_moved(numbered["plain"], Grid(4, tensor=2, context=2), Grid(4, tensor=2), oracle("plain", 2))


OFFSET_GRIDS = [  # trainer, engine on ranks of its own, kind of model
    (Grid(2, tensor=2), Grid(2, first_rank=2), "plain"),
    (Grid(2, tensor=2), Grid(2, first_rank=2, tensor=2), "tied"),
    (Grid(2, pipeline=2), Grid(2, first_rank=2), "tied"),
    (Grid(2, tensor=2), Grid(3, first_rank=2), "plain"),
    (Grid(2, first_rank=2, tensor=2), Grid(2, tensor=2), "plain"),
    (Grid(3, pipeline=3), Grid(2, first_rank=3, tensor=2), "odd"),
    (Grid(4, tensor=2, pipeline=2), Grid(4, first_rank=4, tensor=2), "plain"),
]


@pytest.mark.parametrize(("trainer", "engine", "kind"), OFFSET_GRIDS)
def test_an_engine_on_ranks_of_its_own_gets_the_least_too(
    trainer: Grid, engine: Grid, kind: str, numbered, oracle
) -> None:
    assert_least_is_moved(numbered[kind], trainer, engine, oracle(kind, engine.tensor))


def _sync_into_engine_elsewhere(rank: int, folder: Path, trainer: Grid, engine: Grid) -> dict[str, object]:
    """The world that this rank's library sees, and the engine's parameters after a sync from random ones."""
    from vllm.distributed.parallel_state import get_world_group

    provider = open_provider(folder)
    mesh = parallel.initialize(BACKEND, trainer, engine)
    source = build_trainer(provider, mesh)
    target: dict[str, Tensor] = {}
    if rank in engine.ranks:
        target = open_plain_engine(folder, engine.tensor).parameters()
    before = {name: p.clone() for name, p in target.items()}
    plan = build_plan(provider.weight_map, provider.shape.num_layers, trainer, engine)
    check_fit(provider.weight_map, trainer, engine, rank, source, target)
    Resharder(plan, rank, source, target, 1 << 20, dtype=torch.float32, link=mesh.link).sync(0, verify=True)
    assert all(not torch.equal(p, before[name]) for name, p in target.items() if "norm" not in name)
    seen = get_world_group().world_size if target else parallel_state.get_model_parallel_group().size()
    return {"seen": seen, "weights": {name: p.clone() for name, p in target.items()}}


@pytest.mark.parametrize(
    ("trainer", "engine"),
    [
        (Grid(2, tensor=2), Grid(2, first_rank=2, tensor=2)),
        (Grid(4, tensor=2, pipeline=2), Grid(4, first_rank=4, tensor=2)),
    ],
)
def test_a_live_engine_on_ranks_of_its_own_holds_what_vllm_loads(trainer: Grid, engine: Grid, numbered, oracle) -> None:
    expected = oracle("plain", engine.tensor)
    world = engine.ranks.stop
    ranks = run_world(world, _sync_into_engine_elsewhere, numbered["plain"], trainer, engine, timeout=240)
    for rank, found in enumerate(ranks):
        if rank in engine.ranks:
            assert found["seen"] == engine.tensor, "a replica is a world of its own"
            assert_same(found["weights"], expected[rank % engine.tensor])
        else:
            assert found["seen"] == trainer.tensor * trainer.pipeline


def _sync_into_engine(rank: int, folder: Path, run_dir: Path) -> tuple[Params, dict[str, bool]]:
    cfg = small_config(folder, run_dir, tensor=2, rollout_tensor=2)
    with open_session(cfg, temperature=1.0) as session:
        engine, resharder = build_engine(cfg, session)
        before = {name: p.data_ptr() for name, p in engine.parameters().items()}
        resharder.sync(0)
        after = engine.parameters()
        return {n: p.clone() for n, p in after.items()}, {n: p.data_ptr() == before[n] for n, p in after.items()}


def test_sync_reaches_a_live_engine_in_place(numbered, oracle, tmp_path: Path) -> None:
    ranks = run_world(2, _sync_into_engine, numbered["plain"], tmp_path, timeout=120)
    for (params, in_place), expected in zip(ranks, oracle("plain", 2), strict=True):
        assert_same(params, expected)
        assert all(in_place.values())


def _bad_fit(rank: int, folder: Path) -> str:
    provider = open_provider(folder)
    one = Grid(1)
    source = build_trainer(provider, parallel.initialize(BACKEND, one, one))
    target = {
        entry.engine: torch.zeros(entry.layout.engine(entry.hf, 0, 1).shape)
        for entry in provider.weight_map.engine_entries().values()
    }
    check_fit(provider.weight_map, one, one, rank, source, target)
    head, norm = "language_model.lm_head.weight", "language_model.model.norm.weight"
    target[head] = target[head][:-1]
    target["language_model.surprise"] = target.pop(norm)
    source["decoder.layers.0.mlp.linear_fc2.weight"] = torch.zeros(3, 4)
    with pytest.raises(WeightMismatch) as caught:
        check_fit(provider.weight_map, one, one, rank, source, target)
    return str(caught.value)


def test_every_misfit_is_listed_at_once(tiny_checkpoint: Path) -> None:
    [message] = run_world(1, _bad_fit, tiny_checkpoint)
    assert "language_model.lm_head.weight: the engine has shape [319, 128], expected [320, 128]" in message
    assert "language_model.model.norm.weight: not in the engine" in message
    assert "language_model.surprise: not in the weight table" in message
    assert "decoder.layers.0.mlp.linear_fc2.weight: the trainer has shape [3, 4], expected [128, 256]" in message
    assert len(message.splitlines()) == 5


WHOLE = Block("w", (0, 4), (0, 3), (0, 0))


def plan_from_rank_0(num_params: int) -> ReshardPlan:
    """Rank 0 holds parameters m0, m1 ... of 12 elements; ranks 0 and 1 want them as e0, e1 ..."""
    first, second = np.array([0]), np.array([1])
    transfers = tuple(
        Transfer(f"e{i}", WHOLE, (Holder(f"m{i}", WHOLE, first),), local=first, receivers=second, senders=first)
        for i in range(num_params)
    )
    return ReshardPlan(Grid(2), Grid(2), transfers, np.array([12 * num_params] * 2))


def _sync_bfloat16(rank: int) -> tuple[Params, SyncReport]:
    """An fp32 trainer over a bf16 engine: the sender converts."""
    dist.init_process_group("gloo")
    source = {"m0": torch.linspace(0, 1, 12).view(4, 3)} if rank == 0 else {}
    target = {"e0": torch.ones(4, 3, dtype=torch.bfloat16)}
    return target, Resharder(plan_from_rank_0(1), rank, source, target, 1 << 20).sync(0)


def test_weights_travel_in_the_engines_type() -> None:
    expected = torch.linspace(0, 1, 12).view(4, 3).bfloat16()
    results = run_world(2, _sync_bfloat16)
    assert all(torch.equal(target["e0"], expected) for target, _ in results)
    assert [report.received for _, report in results] == [0, 24]


def _sync_frozen(rank: int) -> list[tuple[int, int, float, float]]:
    """(received, minimum, value of e0, value of e1) after each sync; m0 is frozen and yet changes."""
    dist.init_process_group("gloo")
    source = {f"m{i}": torch.zeros(4, 3) for i in range(2)} if rank == 0 else {}
    target = {f"e{i}": torch.full((4, 3), -1.0) for i in range(2)}
    resharder = Resharder(plan_from_rank_0(2), rank, source, target, 1 << 20, frozen=frozenset({"e0"}))
    seen = []
    for version in range(3):
        for tensor in source.values():
            tensor.fill_(float(version))
        if version == 2:
            resharder.frozen_changed()
        report = resharder.sync(version)
        seen.append((report.received, report.minimum, float(target["e0"][0, 0]), float(target["e1"][0, 0])))
    return seen


def test_frozen_parameters_travel_once_and_when_told() -> None:
    first, second = run_world(2, _sync_frozen)
    assert second == [(96, 96, 0.0, 0.0), (48, 48, 0.0, 1.0), (96, 96, 2.0, 2.0)]
    assert [values[2:] for values in first] == [values[2:] for values in second]


def _sync_and_damage(rank: int) -> str:
    dist.init_process_group("gloo")
    source = {f"m{i}": torch.arange(12.0).view(4, 3) for i in range(2)} if rank == 0 else {}
    target = {f"e{i}": torch.zeros(4, 3) for i in range(2)}
    resharder = Resharder(plan_from_rank_0(2), rank, source, target, 1 << 20)
    resharder.sync(0, verify=True)
    exchange = resharder._exchange

    def swap_two_elements(round_) -> None:
        exchange(round_)
        if rank == 1:
            target["e1"][0, :2] = target["e1"][0, :2].flip(0)

    with mock.patch.object(resharder, "_exchange", swap_two_elements), pytest.raises(WeightMismatch) as caught:
        resharder.sync(1, verify=True)
    return str(caught.value)


def test_verification_names_the_rank_and_what_differs() -> None:
    for message in run_world(2, _sync_and_damage):
        assert message.splitlines()[1:] == ["  rank 1: e1, w rows (0, 4) columns (0, 3)"]
