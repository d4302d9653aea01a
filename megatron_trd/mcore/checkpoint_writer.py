"""One rank's part of writing a checkpoint: Megatron plans it, threads of this process write it.

Megatron would fork processes that write and spawn another one that collects their results. Threads need neither: no
process outlives a rank that is killed, and none is forked from one with CUDA and communication threads. Most of the
time they are in system calls, where they do not hold up the training.
"""

from __future__ import annotations

import inspect
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # noqa: F401  (Megatron's writing function fails without it)
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_trd.mcore.checkpoint_files import describe_file

_FORMAT = ("torch_dist", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What this rank writes of a checkpoint."""

    directory: Path
    writer: filesystem_async.FileSystemWriterAsync
    index: Any
    """Rank 0: Megatron's description of all tensors, which becomes the file `.metadata`."""
    buckets: list[Any]
    """One for each file: (path, name, (serialized objects, tensors in host memory))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a rank wrote."""

    results: list[Any]
    """Megatron's: where each tensor lies."""
    files: dict[str, dict[str, Any]]
    """Name -> size, checksum and rank."""
    error: str = ""
    """Why it failed; empty if it did not."""


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would start to write."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return AsyncRequest(None, (), [])


def plan(state: dict[str, Any], directory: Path, dp_cp: dist.ProcessGroup, *, snapshot: bool) -> Share:
    """Deal the tensors of a sharded state out to ranks and files; rank 0 writes the rest. Collective over all ranks.

    Args:
        dp_cp: ranks with the same weights, which share the work.
        snapshot: copy the tensors, because training goes on.
    """
    filesystem_async._results_queue = queue.Queue()  # or Megatron starts a process that holds one
    strategy = _Plan(*_FORMAT)
    shared = FullyParallelSaveStrategyWrapper(strategy, dp_cp)
    dist_checkpointing.save(state, str(directory), sharded_strategy=shared, async_sharded_save=True)
    buckets = [
        (path, name, (objects, [(item, tensor.detach().to("cpu", copy=snapshot)) for item, tensor in tensors]))
        for path, name, (objects, tensors) in strategy.writer.write_buckets
    ]
    return Share(directory=directory, writer=strategy.writer, index=strategy.index, buckets=buckets)


def write(share: Share, rank: int) -> Written:
    """Write this rank's files and bring them to the disk; a failure is in what it returns."""
    try:
        with ThreadPoolExecutor(max(1, len(share.buckets))) as threads:
            written = threads.map(lambda bucket: _write_file(share, bucket), share.buckets)
            results = [result for file in written for result in file]
            names = [name for _, name, _ in share.buckets]
            described = threads.map(lambda name: describe_file(share.directory / name), names)
            files = {name: {**entry, "rank": rank} for name, entry in zip(names, described, strict=True)}
    except (OSError, RuntimeError) as error:  # torch's serializer makes RuntimeErrors of what the system says
        return Written(results=[], files={}, error=f"rank {rank}: {type(error).__name__}: {error}")
    return Written(results=results, files=files)


def write_index(share: Share, written: list[Written]) -> dict[str, dict[str, Any]]:
    """On rank 0: write what makes the ranks' files a checkpoint; describe all files that are not in `written`."""
    share.writer.finish(share.index, [one.results for one in written])
    save_config(CheckpointingConfig(*_FORMAT), str(share.directory))
    others = {path.name for path in share.directory.iterdir()} - {name for one in written for name in one.files}
    return {name: {**describe_file(share.directory / name), "rank": 0} for name in sorted(others)}


def _write_file(share: Share, bucket: Any) -> list[Any]:
    results: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(0)
    transforms = [share.writer.transforms] if hasattr(share.writer, "transforms") else []
    # Unwrapped: Megatron's decorator switches the garbage collector off, which here is the trainer's.
    inspect.unwrap(share.writer.write_preloaded_data)(transforms, 0, bucket, results, running, True)
    _, outcome = results.get_nowait()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
