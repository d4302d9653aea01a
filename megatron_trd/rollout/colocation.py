"""Servers on the trainer's GPUs: while it trains they hold no keys and values, and where it can be no weights.

    rest:  pause -> flush -> release      a server that is busy when it is told to release dies
    wake:  resume weights -> (the publication) -> resume the cache -> flush -> continue

Servers stay paused in between, so a stray request waits instead of reading memory that is gone. Weights come back
undefined: they are released only where the publication brings them all again, or the server keeps a copy of its own.
Servers do not tell what they gave back: after a trainer was killed while they rested, start them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from megatron_trd.log import get_logger
from megatron_trd.rollout.server_client import CONTROL_TIMEOUT_S, LostError, Server, ServerState
from megatron_trd.rollout.server_pool import ServerPool
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)
CACHE, WEIGHTS = "kv_cache", "weights"


class Colocation:
    """Brings servers to rest and wakes them, and remembers what each of them gave back."""

    def __init__(self, tags: Mapping[Server, tuple[str, ...]]) -> None:
        """Remember the servers and what each gives back at rest."""
        self._tags = dict(tags)
        self._released: dict[Server, tuple[str, ...]] = {}

    @classmethod
    async def begin(cls, student: ServerPool, teacher: ServerPool | None, *, all_weights_return: bool) -> Colocation:
        """Ask every server what it can give back.

        Args:
            teacher: servers whose weights never change; None if there are none beside the student's.
            all_weights_return: each publication brings the student's weights whole.

        Raises:
            ServerError: a server cannot give memory back, or does not answer.
        """
        tags: dict[Server, tuple[str, ...]] = {}
        for pool in (student, teacher):
            for server in pool.servers if pool is not None else ():
                settings = await server.get("/server_info", CONTROL_TIMEOUT_S)
                tags[server] = _tags(server.url, settings, all_weights_return and pool is student)
        return cls(tags)

    async def rest(self) -> None:
        """Have every server give its memory back; one that is lost on the way is out of use.

        Raises:
            ServerError: a server did not come to rest, and would share the GPU with the trainer.
        """
        busy = [server.url for server in self._tags if server.num_in_flight]
        assert not busy, f"requests are in flight to {busy}"
        outcomes = await asyncio.gather(*map(self._rest, self._tags), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _rest(self, server: Server) -> None:
        try:
            await server.pause("abort")
            await server.flush()
            await server.release_memory(self._tags[server])
        except LostError as error:
            _lose(server, error)
        else:
            self._released[server] = self._tags[server]

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Give servers the memory for weights, which are published inside, and when that is over all of it."""
        await asyncio.gather(*(self._resume(server, WEIGHTS) for server in self._released))
        try:
            yield
        finally:
            await asyncio.gather(*map(self._wake, self._released))
            self._released.clear()

    async def end(self) -> None:
        """Wake what still rests because the run broke off."""
        if not self._released:
            return
        logger.warning("servers wake without weights; the next run sends them: %s", _urls(self._released))
        async with self.awake():
            pass

    async def _resume(self, server: Server, tag: str) -> None:
        if tag in self._released[server] and server.state is not ServerState.DOWN:
            try:
                await server.resume_memory((tag,))
            except ServerError as error:
                _lose(server, error)

    async def _wake(self, server: Server) -> None:
        await self._resume(server, CACHE)
        if server.state is ServerState.DOWN:
            return
        try:
            await server.flush()
            await server.continue_()
        except ServerError as error:
            _lose(server, error)


def _tags(url: str, settings: Mapping[str, Any], weights_return: bool) -> tuple[str, ...]:
    if not settings.get("enable_memory_saver"):
        raise ServerError(
            f"--colocate: {url} cannot give memory back; start it with --enable-memory-saver, or leave out --colocate"
        )
    return (CACHE, WEIGHTS) if weights_return or settings.get("enable_weights_cpu_backup") else (CACHE,)


def _lose(server: Server, error: ServerError) -> None:
    server.state, server.trouble = ServerState.DOWN, str(error)
    logger.warning("%s is out of use: %s", server.url, error)


def _urls(servers: Iterable[Server]) -> str:
    return ", ".join(server.url for server in servers)
