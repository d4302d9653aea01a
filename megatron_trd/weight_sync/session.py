"""What every transport does around its own part: no server decodes with weights it is half through taking.

    pause -> flush -> begin -> (the transport's part) -> end -> continue -> read back

A server that fails at any of it drops out. It is set going again without the requests that it held, which its fleet
sends elsewhere, and stays out of use until a later publication reaches it. One that may hold a part of the new weights
says so: its weights are named after neither version.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TypeVar

from megatron_trd.log import get_logger
from megatron_trd.weight_sync.base import ServerError, SyncReport, WeightServer, WeightServers

logger = get_logger(__name__)

T = TypeVar("T")
REST_TIMEOUT_S = 30.0
"""For coming to rest, at most: a server that hangs must leave time for the others."""
CONTINUE_TIMEOUT_S = 10.0
"""Servers are set going again even when the deadline has passed."""


@contextmanager
def exhausting(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate to the end whatever happens in the block: the other ranks take part in making every item."""
    iterator = iter(items)
    try:
        yield iterator
    finally:
        deque(iterator, maxlen=0)


class WeightUpdate:
    """One publication under way. An async context manager: servers decode again when it is left."""

    def __init__(
        self,
        servers: WeightServers,
        version: str,
        *,
        timeout_s: float,
        at_rest: bool = True,
        in_session: bool = True,
        adapter: str | None = None,
        check_equal: bool = False,
        only: Collection[str] | None = None,
    ) -> None:
        """Remember what to do; nothing is sent.

        Args:
            timeout_s: the longest time that the servers may be at rest.
            at_rest: pause the servers and drop their caches; needless where requests name the weights they want.
            in_session: open a weight-update session on each server, and name the weights when it is closed.
            adapter: LoRA adapter that requests must name afterwards.
            check_equal: compare the checksums of all servers that take part.
            only: URLs of the servers that take part; None = all.
        """
        self.servers, self.version, self.timeout_s = servers, version, timeout_s
        self.at_rest, self.in_session, self.adapter = at_rest, in_session, adapter
        self.check_equal, self.only = check_equal, only
        self.num_bytes = 0
        self._started = self._paused_at = time.monotonic()
        self.paused_seconds = 0.0
        self.failures: dict[str, str] = {}
        self.taking_part: list[WeightServer] = []
        self._asked: list[WeightServer] = []
        self._begun: list[WeightServer] = []

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.1, self._paused_at + self.timeout_s - time.monotonic())

    def share_s(self) -> float:
        """Half of what is left: the deadline of one call of several, so that a server that hangs at it drops out in
        time for the others."""
        return self.left_s() / 2

    async def each(self, action: Callable[[WeightServer], Awaitable[None]]) -> None:
        """Do something to every server that still takes part, all at once; one that fails takes part no longer."""

        async def attempt(server: WeightServer) -> None:
            try:
                await action(server)
            except ServerError as error:
                self.drop(server, str(error))

        outcomes = await asyncio.gather(*(attempt(s) for s in list(self.taking_part)), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def drop(self, server: WeightServer, reason: str) -> None:
        """Leave a server out from now on."""
        self.failures.setdefault(server.url, reason)
        if server in self.taking_part:
            self.taking_part.remove(server)

    async def __aenter__(self) -> WeightUpdate:
        """Bring every server to rest."""
        self.servers.begin_update(self.version)
        self.taking_part = [s for s in self.servers.servers if self.only is None or s.url in self.only]
        self._paused_at = time.monotonic()
        try:
            await self.each(self._open)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def _open(self, server: WeightServer) -> None:
        self._asked.append(server)
        rest_s = min(REST_TIMEOUT_S, self.share_s())
        if self.at_rest:
            await server.pause("retract", rest_s)
            await server.flush(rest_s)
        if self.in_session:
            self._begun.append(server)
            await server.begin_weight_update(rest_s)

    async def _close(self, server: WeightServer) -> None:
        if self.in_session:
            await server.end_weight_update(self.left_s())
        if self.in_session or self.adapter:
            await server.name_weights(self.version, self.left_s())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Set every server going, and find out what each holds. After an exception none counts as updated."""
        try:
            if error is not None:
                for server in list(self.taking_part):
                    self.drop(server, f"{server.url}: the update broke off: {error!r}")
            await self.each(self._close)
            if self.check_equal:
                await self._compare()
        finally:
            await asyncio.gather(*(self._continue(server) for server in self._asked))
            self.paused_seconds = time.monotonic() - self._paused_at if self.at_rest else 0.0
            await self.each(self._verify)
            self.servers.end_update(self.version, self.failures, self.adapter)
        for url, reason in self.failures.items():
            logger.warning("%s did not take weights %s and is out of use until it does: %s", url, self.version, reason)

    async def _continue(self, server: WeightServer) -> None:
        """Set a server going; of one that failed, first end the requests and the session, as far as it answers."""
        end = time.monotonic() + CONTINUE_TIMEOUT_S

        def left_s() -> float:
            return max(0.1, end - time.monotonic())

        if server.url in self.failures and server in self._begun:
            with suppress(ServerError):
                await server.end_weight_update(left_s())
            with suppress(ServerError):
                await server.name_weights(f"broken-{self.version}", left_s())
        if not self.at_rest:
            return
        if server.url in self.failures:
            with suppress(ServerError):
                await server.pause("abort", left_s())
        try:
            await server.continue_(left_s())
        except ServerError as error:
            self.drop(server, str(error))

    async def _verify(self, server: WeightServer) -> None:
        held = await server.read_weight_version(CONTINUE_TIMEOUT_S)
        if held != self.version:
            raise ServerError(f"{server.url} says it holds weights {held!r}")

    async def _compare(self) -> None:
        """Drop every server whose weights differ from those of the first that holds the version."""
        holders = [s for s in self.servers.servers if s not in self._asked and s.weight_version == self.version]
        sums: dict[str, object] = {}

        async def read(server: WeightServer) -> None:
            sums[server.url] = await server.weight_checksums(self.left_s())

        for server in holders[:1]:
            with suppress(ServerError):
                await read(server)
        await self.each(read)
        first = next(iter(sums), "")
        for server in list(self.taking_part):
            if sums[server.url] != sums[first]:
                self.drop(server, f"{server.url} holds other weights than {first} under the same version")

    def report(self) -> SyncReport:
        """Describe the publication, when it is over.

        Raises:
            ServerError: no server took the weights.
        """
        if self.failures and len(self.failures) == len(self._asked):
            raise ServerError(f"no server took weights {self.version}: " + "; ".join(self.failures.values()))
        return SyncReport(
            version=self.version,
            num_bytes=self.num_bytes,
            seconds=time.monotonic() - self._started,
            paused_seconds=self.paused_seconds,
            failures=dict(self.failures),
        )
