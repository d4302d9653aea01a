"""Weights that a trainer broadcasts to the embedded server over a process group of theirs."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.weight_sync.process_group import join_group, leave_group

T = TypeVar("T")


class UpdateGroups:
    """The groups that this server is a member of.

    Whatever waits for a trainer does so in a thread of its own: a trainer that died holds up neither the event loop
    nor the engine, nor the end of the process.
    """

    def __init__(self, timeout_s: float) -> None:
        """Remember the deadline of joining and of each broadcast."""
        self._timeout_s = timeout_s
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._pending: set[asyncio.Future[Any]] = set()

    async def join(self, name: str, backend: str, address: str, port: int, rank: int, world_size: int) -> None:
        """Join; ends when all members are there. Raises ValueError."""
        if name in self._groups:
            raise ValueError(f"group {name!r} exists already; destroy it first")

        def enter() -> None:  # in the thread: a member whose client has hung up meanwhile can still be destroyed
            self._groups[name] = join_group(address, port, rank, world_size, name, backend, self._timeout_s)

        await self._in_thread(enter)

    async def leave(self, name: str) -> None:
        """Leave. Raises ValueError."""
        if name not in self._groups:
            raise ValueError("The group to be destroyed does not exist.")
        group = self._groups.pop(name)
        await self._in_thread(lambda: leave_group(group))

    async def receive(
        self, name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], as_bucket: bool
    ) -> list[tuple[str, Tensor]]:
        """Receive tensors from rank 0: one broadcast each, or one of all their bytes. Raises ValueError."""
        if name not in self._groups:
            raise ValueError(
                f"Group {name} not in {list(self._groups)}. Please call `init_weights_update_group` first."
            )
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes must be as many")
        kinds = [kind for dtype in dtypes if isinstance(kind := getattr(torch, str(dtype), None), torch.dtype)]
        if len(kinds) < len(dtypes):
            raise ValueError(f"dtypes {dtypes!r:.100} must be names of torch dtypes, e.g. bfloat16")
        group = self._groups[name]
        receive = _receive_bucket if as_bucket else _receive_each
        return list(zip(names, await self._in_thread(lambda: receive(group, kinds, shapes)), strict=True))

    def close(self) -> None:
        """Stop waiting for trainers; what waits is cancelled."""
        for waiting in self._pending:
            waiting.cancel()

    async def _in_thread(self, action: Callable[[], T]) -> T:
        """Run what may block for long; `RuntimeError` (torch's word for a lost or late peer) becomes ValueError."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # nobody can end the thread

        def run() -> None:
            try:
                future.set_result(action())
            except (RuntimeError, ValueError, TypeError, OSError) as error:
                future.set_exception(error)

        threading.Thread(target=run, name="update-group", daemon=True).start()
        waiting = asyncio.wrap_future(future)
        self._pending.add(waiting)
        try:
            return await waiting
        except (RuntimeError, TypeError, OSError) as error:
            raise ValueError(str(error)) from error
        finally:
            self._pending.discard(waiting)


def _receive_each(
    group: dist.ProcessGroup, dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    tensors = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for work in [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]:
        work.wait()
    return tensors


def _receive_bucket(
    group: dist.ProcessGroup, dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    bucket = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(bucket, src=0, group=group)
    parts = zip(bucket.split(sizes), dtypes, shapes, strict=True)
    return [part.view(dtype).reshape(tuple(shape)) for part, dtype, shape in parts]
