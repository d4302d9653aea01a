"""SGLang's router before a fleet: requests go to it, and its list of workers is kept to the servers in use.

The router has no weight-update, pause or abort routes, so those calls go to each server's own address. A server that
holds wrong weights answers health checks all the same: the router would go on sending it requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from megatron_trd.rollout.server_client import CONTROL_TIMEOUT_S, Server
from megatron_trd.weight_sync.base import ServerError

POLL_GAP_S = 0.1


class Router:
    """One sglang-router."""

    def __init__(self, server: Server) -> None:
        """Remember where it is; nothing is sent."""
        self.server = server
        self._offered: frozenset[str] | None = None
        self._lock = asyncio.Lock()

    async def offer(self, urls: Collection[str], known: Collection[str]) -> None:
        """Make the router send requests to `urls` and to no other server of `known`. Quick if nothing changed.

        Raises:
            ServerError: the router does not answer, or did not take the change in time.
        """
        wanted = frozenset(urls)
        async with self._lock:
            if wanted == self._offered:
                return
            self._offered = None
            deadline = asyncio.get_running_loop().time() + CONTROL_TIMEOUT_S
            while (workers := await self._workers()).keys() & set(known) != wanted:
                if asyncio.get_running_loop().time() > deadline:
                    raise ServerError(
                        f"{self.server.url}: the router has the workers {sorted(workers)} instead of {sorted(wanted)} "
                        f"after {CONTROL_TIMEOUT_S:g} s; look at its log"
                    )
                await self._change(workers, wanted, known)
                await asyncio.sleep(POLL_GAP_S)  # it queues changes and works them off
            self._offered = wanted

    async def _change(self, workers: dict[str, str], wanted: Collection[str], known: Collection[str]) -> None:
        for url in wanted - workers.keys():
            await self.server.post("/workers", {"url": url}, CONTROL_TIMEOUT_S)
        for url in workers.keys() & set(known) - set(wanted):
            await self.server.delete(f"/workers/{workers[url]}", CONTROL_TIMEOUT_S)

    async def _workers(self) -> dict[str, str]:
        """Return URL -> id of its workers."""
        answer = await self.server.get("/workers", CONTROL_TIMEOUT_S)
        if not isinstance(answer, dict) or "workers" not in answer:
            raise ServerError(
                f"{self.server.url}: /workers has no list of workers; is it an sglang-router (0.3 or later)?"
            )
        return {worker["url"].rstrip("/"): worker["id"] for worker in answer["workers"]}
