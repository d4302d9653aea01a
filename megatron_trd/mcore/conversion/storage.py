"""Tensors of a distributed checkpoint, written and read one at a time.

Both directions use torch's checkpoint planners: a storage writer asks its planner for the data of each item when it
is about to write it, so nothing has to exist before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_trd.mcore.checkpoint_files import TRACKER, checkpoint_directory
from megatron_trd.mcore.conversion.sharing import cut
from megatron_trd.mcore.conversion.slots import Slot

MAX_FILE_BYTES = 1 << 30
RELEASE = "release"
"""Megatron's name, in place of an iteration, for weights that come without a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A parameter that is made when it is written."""

    slot: Slot
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes once made."""
        return prod(self.slot.shape) * self.dtype.itemsize


def write_checkpoint(directory: Path, tensors: list[LazyTensor], common: Mapping[str, Any]) -> None:
    """Write a checkpoint as Megatron's `torch_dist` format has it. Collective over all ranks.

    Args:
        directory: empty or not there.
        tensors: this rank's share; all ranks' together must be the whole of each of the checkpoint's tensors.
        common: what is not a tensor of the model; rank 0's is written.

    Raises:
        ValueError: a rank could not read or write.
    """
    try:
        dcp.save({}, storage_writer=_FileWriter(directory, single_file_per_rank=True), planner=_LazyPlanner(tensors))
    except dcp.api.CheckpointException as error:  # which all ranks get when one fails
        rank, (cause, _) = min(error.failures.items())
        raise ValueError(f"{directory}: rank {rank} could not write its part: {cause}") from error
    get_default_save_common_strategy().save_common(dict(common), directory)
    if torch.distributed.get_rank() == 0:
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def file_sizes(tensors: Sequence[LazyTensor], rank: int) -> dict[str, int]:
    """Return the files that `write_checkpoint` makes of a rank's share, and the bytes of the tensors in each."""
    sizes = [tensor.nbytes for tensor in tensors]
    return {f"__{rank}_{i}_0.distcp": sum(run) for i, run in enumerate(cut(sizes, sizes, MAX_FILE_BYTES))}


def find_checkpoint(path: Path, flag: str) -> Path:
    """Return the checkpoint in a directory, by its tracker, or the directory itself where it is one.

    Raises:
        ValueError: there is none.
    """
    if maybe_load_config(str(path)) is not None:
        return path
    if not (path / TRACKER).is_file():
        raise ValueError(f"--{flag} {path}: no {TRACKER} there; give a directory with checkpoints, or one of them")
    text = (path / TRACKER).read_text().strip()
    found = checkpoint_directory(path, int(text)) if text.isdigit() else path / text
    if not found.is_dir():
        raise ValueError(f"--{flag} {path}: {TRACKER} names {text!r}, but there is no {found}")
    return found


class _LazyPlanner(dcp.DefaultSavePlanner):
    def __init__(self, tensors: list[LazyTensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = {MetadataIndex(t.slot.key, t.slot.offset): t for t in tensors}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(index, tensor) for index, tensor in self._tensors.items()])
        return self.plan

    def nbytes(self, write_item: WriteItem) -> int:
        """Bytes of an item's data."""
        return self._tensors[write_item.index].nbytes

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._tensors[write_item.index]
        return tensor.make().to(tensor.dtype).reshape(tensor.slot.extent)

    @staticmethod
    def _item(index: MetadataIndex, tensor: LazyTensor) -> WriteItem:
        slot = tensor.slot
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(slot.offset), torch.Size(slot.extent)),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(slot.size),
        )
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _FileWriter(dcp.FileSystemWriter):
    """Starts a new file every `MAX_FILE_BYTES`: the base class lets go of a file's tensors when it closes it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, _LazyPlanner)
        results: list[WriteResult] = []
        prefix = plan.storage_data.prefix
        sizes = [planner.nbytes(item) for item in plan.items]
        for number, items in enumerate(cut(plan.items, sizes, MAX_FILE_BYTES)):
            part = replace(plan, items=items, storage_data=replace(plan.storage_data, prefix=f"{prefix}{number}_"))
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class CheckpointReader:
    """Reads parts of the tensors of a distributed checkpoint, whatever layout it was saved in."""

    def __init__(self, directory: Path) -> None:
        """Read the table of contents.

        Raises:
            ValueError: the directory is no `torch_dist` checkpoint.
        """
        config = maybe_load_config(str(directory))
        if config is None or config.sharded_backend != "torch_dist" or not (directory / ".metadata").is_file():
            raise ValueError(f"{directory}: no distributed checkpoint there (metadata.json of torch_dist, .metadata)")
        self.directory = directory
        self._files = dcp.FileSystemReader(directory)
        metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor was saved in."""
        return self.tensors[key].properties.dtype

    def read(self, slot: Slot) -> Tensor:
        """Read one parameter.

        Raises:
            ValueError: a part of it was never saved, or its file is damaged.
        """
        entry = self.tensors[slot.key]
        target = torch.empty(slot.extent, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(slot.offset), torch.Size(slot.extent))
        saved = replace(entry, chunks=self._chunks_at(slot))
        items = create_read_items_for_chunk_list(slot.key, saved, [wanted])
        if sum(prod(item.lengths) for item in items) != target.numel():
            raise ValueError(f"{self.directory}: {slot.key} at {slot.offset} was not saved whole")
        try:
            self._files.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.directory}: {slot.key} at {slot.offset} cannot be read: {error}") from error
        return target.reshape(slot.shape)

    def _chunks_at(self, slot: Slot) -> list[ChunkStorageMetadata]:
        """The saved chunks that may hold a part of the slot, found without looking at those of every layer."""
        if slot.key not in self._chunks:
            stacked = range(len(slot.index))
            chunks = self._chunks[slot.key] = defaultdict(list)
            for chunk in self.tensors[slot.key].chunks:
                spans = (range(chunk.offsets[i], chunk.offsets[i] + chunk.sizes[i]) for i in stacked)
                for index in product(*spans):
                    chunks[index].append(chunk)
        return self._chunks[slot.key].get(slot.index, [])


class _Into(dcp.DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.transform_tensor(read_item, self._target)
