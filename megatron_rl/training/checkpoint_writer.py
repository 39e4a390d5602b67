# SPDX-License-Identifier: Apache-2.0
"""Writes a rank's part of a checkpoint in the rank itself, tensor by tensor, and takes the digest of what it writes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from checkpoint_tools.digests import FileDigest, HashedStream


class RankSave(TorchDistSaveShardedStrategy):
    """Megatron-core 0.16.1's torch_dist format, written by `RankWriter`.

    Its own writer forks processes that stay behind for ever when the rank is killed, and copies every tensor first.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.written: dict[str, FileDigest] = {}

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = RankWriter(checkpoint_dir, self.written)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        plan, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(state, False), writer, None, 0, planner=planner)
        return self._get_save_and_finalize_callbacks(writer, plan)


class RankWriter(FileSystemWriterAsync):
    """One file a rank. `written` receives its digest, by its name."""

    def __init__(self, folder: Path, written: dict[str, FileDigest]):
        super().__init__(folder)
        self._folder, self._written = Path(folder), written
        self._results: list[WriteResult] | WRAPPED_EXCEPTION = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._plan, self._planner = plan, planner

    def get_save_function_and_args(self) -> tuple[Callable[[], None], None, list[object]]:
        return self._write, None, []

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        """What was written, or the error of this rank, which Megatron-core then raises on all."""
        return self._results

    def _write(self) -> None:
        if not self._plan.items:
            return
        name = f"{self._plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        with (self._folder / name).open("wb", buffering=0) as file:
            stream = HashedStream(file)
            try:
                self._results = [self._write_one(stream, name, item) for item in self._plan.items]
                os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:  # torch reports some errors of a stream as its own
                self._results = _wrap_exception(stream.error or error)
        self._written[name] = stream.digest()

    def _write_one(self, stream: HashedStream, name: str, item: WriteItem) -> WriteResult:
        data = self._planner.resolve_data(item)
        if isinstance(data, torch.Tensor):
            data = data.detach().to("cpu", copy=True)  # of a view, the whole storage would be written
        assert isinstance(data, torch.Tensor | io.BytesIO)
        return _write_item(self.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)


def bytes_to_write(state: Mapping[str, Any]) -> int:
    """Of the tensors that this rank writes of a sharded state."""
    found = (value for value in nested_values(dict(state)) if isinstance(value, ShardedTensor | ShardedTensorFactory))
    return sum(v.data.nbytes for v in found if v.data is not None and is_main_replica(v.replica_id))
