"""The process group of one trainer and its servers. No member that dies or hangs holds up the trainer for long."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.weight_sync.base import ServerError, WeightServer
from megatron_trd.weight_sync.buckets import Bucket
from megatron_trd.weight_sync.process_group import join_group, leave_group
from megatron_trd.weight_sync.session import WeightUpdate

T = TypeVar("T")
JOIN_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 5.0
POLL_GAP_S = 0.0005


class UpdateGroup:
    """Rank 0 is this process; every rank of every server has one of the others."""

    def __init__(self, servers: Sequence[WeightServer], address: str, backend: str) -> None:
        """Remember who shall belong to it.

        Args:
            address: where the servers reach this process.
            backend: `nccl` or `gloo`.
        """
        self.servers, self.address, self.backend = list(servers), address, backend
        self.name = f"trd-{uuid.uuid4().hex[:12]}"
        self._group: dist.ProcessGroup | None = None
        self._failed = threading.Event()
        """A server failed: whoever waits for it in a thread may stop."""

    def serves(self, servers: Sequence[WeightServer], backend: str) -> bool:
        """Whether it has exactly these servers, and works."""
        return self._group is not None and self.servers == list(servers) and self.backend == backend

    async def join(self, update: WeightUpdate) -> None:
        """Bring all members together. If one is not there in time there is no group, and all servers are dropped."""
        timeout_s = min(JOIN_TIMEOUT_S, update.share_s())
        sizes = [server.tp_size for server in self.servers]
        first_ranks = {s.url: 1 + sum(sizes[:i]) for i, s in enumerate(self.servers)}
        world_size = 1 + sum(sizes)
        try:
            store = await in_thread(lambda: self._open_store(world_size, timeout_s))
            joining = in_thread(
                lambda: join_group(self.address, store.port, 0, world_size, self.name, self.backend, timeout_s)
            )
            await update.each(
                lambda server: server.join_update_group(
                    self.name, self.backend, self.address, store.port, first_ranks[server.url], world_size, timeout_s
                )
            )
            self._group = await joining
        except (RuntimeError, ValueError) as error:
            reason = f"made no update group at --weight-sync-address {self.address}: {error}"
        else:
            reason = "another server did not join the update group"
        if not self.serves(update.taking_part, self.backend):
            for server in list(update.taking_part):
                update.drop(server, f"{server.url}: {reason}")

    def _open_store(self, world_size: int, timeout_s: float) -> dist.TCPStore:
        """Open the store that members meet at, on a port the system chooses; `join_group` finds it by that port."""
        return dist.TCPStore(
            self.address,
            0,
            world_size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    async def broadcast(self, bucket: Bucket, update: WeightUpdate) -> None:
        """Send a bucket; servers that do not say that they took it are dropped. Afterwards the group may be broken."""
        timeout_s = update.share_s()
        dtypes = [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]

        async def receive(server: WeightServer) -> None:
            try:
                await server.update_weights_from_distributed(
                    self.name, bucket.names, dtypes, bucket.shapes, timeout_s + 1.0
                )
            except ServerError:
                self._failed.set()
                raise

        if bucket.flat.is_cuda:
            torch.cuda.synchronize(bucket.flat.device)  # filled on the stream of this thread
        received = asyncio.ensure_future(update.each(receive))
        try:
            await asyncio.wait_for(in_thread(lambda: self._send(bucket.flat, timeout_s)), timeout_s + 1.0)
        except (RuntimeError, asyncio.TimeoutError):
            await self._leave_alone()  # servers that still wait for the rest shall fail at once
        except BaseException:
            received.cancel()
            raise
        await received
        if self._failed.is_set():
            await self._leave_alone()

    def _send(self, flat: Tensor, timeout_s: float) -> None:
        """Broadcast from rank 0, and wait in a way that ends. Raises RuntimeError."""
        group, work, deadline = self._group, None, time.monotonic() + timeout_s
        if group is None:
            raise RuntimeError("the group is gone")
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, timedelta(seconds=timeout_s)
        try:
            with torch.cuda.device(flat.device) if flat.is_cuda else nullcontext():
                work = group.broadcast([flat], options)
                while not work.is_completed():
                    if self._failed.is_set() or time.monotonic() > deadline:
                        raise RuntimeError("a member of the group failed or is late")
                    time.sleep(POLL_GAP_S)
                work.wait()
        finally:
            del group, work  # a traceback would keep them, and only a group that nobody holds closes its connections

    async def leave(self) -> None:
        """Dissolve the group, as far as its members answer."""

        async def ask(server: WeightServer) -> None:
            with suppress(ServerError):
                await server.leave_update_group(self.name, LEAVE_TIMEOUT_S)

        await self._leave_alone()
        await asyncio.gather(*(ask(server) for server in self.servers))

    async def _leave_alone(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return

        def end(group: dist.ProcessGroup = group) -> None:
            group.abort()  # of what is still under way
            leave_group(group)

        del group
        with suppress(asyncio.TimeoutError, RuntimeError, ValueError):
            await asyncio.wait_for(in_thread(end), LEAVE_TIMEOUT_S)


def in_thread(action: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a daemon thread: what hangs in foreign code holds up neither the event loop nor the end of the process."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # cancelling the wait leaves the thread alone

    def run() -> None:
        try:
            future.set_result(action())
        except (RuntimeError, ValueError, OSError) as error:
            future.set_exception(error)

    threading.Thread(target=run, name="update-group", daemon=True).start()
    return asyncio.wrap_future(future)
