"""The servers of one model: which of them may be asked, which weights are right, and whom to ask next."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp

from megatron_trd.log import get_logger
from megatron_trd.rollout.router import Router
from megatron_trd.rollout.server_client import PROBE_TIMEOUT_S, Server, ServerState
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)

MAX_PROBE_GAP_S = 30.0
AFFINITY_SLACK = 8
"""A prompt goes where it was sent before unless that server has more requests than this above the least loaded one."""
MAX_REMEMBERED_PROMPTS = 4096


class ServerPool:
    """The `WeightServers` of one model. An async context manager.

    Only READY servers get requests. The others are probed in passing and come back only with the expected weights.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        server_timeout_s: float = 60.0,
        api_key: str | None = None,
        router_url: str | None = None,
    ) -> None:
        """Remember the settings; nothing is sent.

        Args:
            server_timeout_s: how long `wait_healthy` waits unless it is told otherwise.
            api_key: what the servers ask for; None = nothing.
            router_url: an sglang-router that requests go to, instead of the servers themselves.
        """
        self._urls = tuple(dict.fromkeys(urls))
        self.server_timeout_s, self._api_key = server_timeout_s, api_key
        self._router_url = router_url
        self.servers: list[Server] = []
        self.router: Router | None = None
        self.expected_version: str | None = None
        """What servers must hold; None until the first update: any version is right."""
        self.adapter: str | None = None
        """LoRA adapter that requests name."""
        self._arriving_version: str | None = None
        self._before: frozenset[str] = frozenset()
        self._accepted: frozenset[str] | None = None
        self._times_stale: Counter[str] = Counter()
        self._homes: OrderedDict[int, Server] = OrderedDict()
        self._came_ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._probes: set[asyncio.Task[None]] = set()

    async def _open(self) -> None:
        # Servers close idle connections (uvicorn: after 5 s): none may sleep through a training step and be used again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(connector=connector)
        self.servers = [Server(url, self._session, self._api_key) for url in self._urls]
        if self._router_url is not None:
            self.router = Router(Server(self._router_url, self._session, self._api_key))

    async def _close(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._session.close()

    # ------------------------------------------------------------- weights

    def begin_update(self, version: str) -> None:
        """See `WeightServers.begin_update`."""
        self._arriving_version = version
        held = {s.weight_version for s in self.servers if s.state is ServerState.READY} - {version, None}
        if held:  # not so when the same version is sent once more, to servers that missed it
            self._before = frozenset(map(str, held))

    def end_update(self, version: str, failures: Mapping[str, str], adapter: str | None = None) -> None:
        """See `WeightServers.end_update`."""
        self.expected_version, self._arriving_version = version, None
        self.adapter = adapter
        for server in self.servers:
            if server.url not in failures:
                server.weight_version = version
                self._judge(server)
            else:
                self._set_stale(server, failures[server.url])
                server.probe_after = 0.0

    def accept(self, versions: Collection[str] | None) -> None:
        """Say of which weights the tokens of a response may be, beside those that servers must hold now.

        Args:
            versions: None (the start) = those that servers held before the last update, so that a response which the
                update interrupted may end with the new weights.
        """
        self._accepted = None if versions is None else frozenset(versions)

    def accepts(self, versions: Iterable[str]) -> bool:
        """Whether a response may have tokens of all these versions."""
        older = self._before if self._accepted is None else self._accepted
        return all(self._is_held(version) or version in older for version in versions)

    def _is_held(self, version: str | None) -> bool:
        """Whether a server may hold this version now."""
        return self.expected_version is None or version in (self.expected_version, self._arriving_version)

    # ------------------------------------------------------------- states

    async def choose(self, prompt_key: int, avoid: Server | None, timeout_s: float) -> Server | None:
        """Return the READY server to ask next; None if one round of probes found none in time.

        The least loaded one, another than `avoid` if possible; but the one that knows the prompt if it is about as
        free.

        Args:
            prompt_key: hash of the prompt.
        """
        end = time.monotonic() + timeout_s
        self._probe_due()
        if not self._probes and not self._ready():
            next_probe = min((server.probe_after for server in self.servers), default=end)
            self._came_ready.clear()
            with suppress(asyncio.TimeoutError):  # a publication may bring one back before
                await asyncio.wait_for(self._came_ready.wait(), max(0.0, min(next_probe, end) - time.monotonic()))
            self._probe_due()
        while not self._ready() and self._probes and (left := end - time.monotonic()) > 0:
            await asyncio.wait(self._probes, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        chosen = self.least_loaded(avoid)
        home = self._homes.get(prompt_key)
        if chosen is None:
            return None
        if self.router is not None:
            await self.router.offer({s.url for s in self._ready()}, {s.url for s in self.servers})
            return self.router.server
        if home is not None and home is not avoid and home.state is ServerState.READY:
            chosen = home if home.num_in_flight <= chosen.num_in_flight + AFFINITY_SLACK else chosen
        self._homes[prompt_key] = chosen
        self._homes.move_to_end(prompt_key)
        if len(self._homes) > MAX_REMEMBERED_PROMPTS:
            self._homes.popitem(last=False)
        return chosen

    def least_loaded(self, avoid: Server | None) -> Server | None:
        """Return the READY server with the fewest requests; `avoid` only if there is no other."""
        return min(self._ready(), key=lambda s: (s is avoid, s.num_in_flight), default=None)

    def _ready(self) -> list[Server]:
        return [server for server in self.servers if server.state is ServerState.READY]

    async def wait_healthy(self, deadline_s: float | None = None) -> None:
        """Wait until every server is READY.

        Raises:
            ServerError: some were not in time; the message names each, what was seen and what to do.
        """
        end = time.monotonic() + (self.server_timeout_s if deadline_s is None else deadline_s)
        while True:
            await asyncio.gather(*(self._probe(s) for s in self.servers if s.state is not ServerState.READY))
            waiting = [s for s in self.servers if s.state is not ServerState.READY]
            if not waiting:
                return
            if time.monotonic() >= end:
                seen = "; ".join(map(str, waiting))
                raise ServerError(f"{seen}. Start the server or correct --student-urls/--teacher-urls")
            await asyncio.sleep(0.2)

    def require_ready(self) -> None:
        """Raise ServerError if no server may be used; the message names each and its trouble."""
        if not self._ready():
            raise ServerError(f"no server holds weights {self.expected_version}: " + "; ".join(map(str, self.servers)))

    async def model_name(self) -> str:
        """Return the model and the weights that all servers hold, e.g. `models/student@default`.

        Raises:
            ServerError: a server does not answer, or holds another model or other weights.
        """
        await self.wait_healthy()
        infos = [await server.model_info() for server in self.servers]
        names = [f"{info['model_path']}@{info['weight_version']}" for info in infos]
        if len(set(names)) > 1:
            raise ServerError(
                "servers hold different weights: " + ", ".join(map(" ".join, zip(self._urls, names, strict=True)))
            )
        return names[0]

    def _probe_due(self) -> None:
        now = time.monotonic()
        for server in self.servers:
            if server.state is not ServerState.READY and now >= server.probe_after:
                server.probe_after = now + server.probe_gap_s
                server.probe_gap_s = min(2 * server.probe_gap_s, MAX_PROBE_GAP_S)
                probe = self._spawn(self._probe(server))
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)

    async def _probe(self, server: Server) -> None:
        """Ask a server who it is and decide its state; one that a dead trainer left paused is set going."""
        try:
            await server.read_info()
            if self._is_held(server.weight_version) and self._arriving_version is None:
                await server.continue_(PROBE_TIMEOUT_S)
                await server.check_health()
        except ServerError as error:
            self._set_down(server, str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._set_down(server, f"its answers cannot be read: {error!r}; is it an SGLang server?")
        else:
            self._judge(server)

    def _judge(self, server: Server) -> None:
        if self._is_held(server.weight_version):
            server.state, server.trouble, server.probe_gap_s = ServerState.READY, "", 1.0
            self._came_ready.set()
        else:
            self._set_stale(server, f"holds weights {server.weight_version!r}, not {self.expected_version!r}")

    def _set_stale(self, server: Server, trouble: str) -> None:
        if server not in self.servers:  # a router: ask all servers which of them it was
            self._times_stale[server.url] += 1
            for suspect in self.servers:
                self._spawn(self._probe(suspect))
        if server.state is not ServerState.STALE:
            logger.warning("%s is out of use: %s", server.url, trouble)
            self._times_stale[server.url] += 1
        server.state, server.trouble = ServerState.STALE, trouble

    def times_stale(self, server: Server) -> int:
        """How often a server turned out to hold wrong weights: what it sampled meanwhile may be of half-loaded ones.

        Of a router: how often any server behind it did.
        """
        return self._times_stale[server.url] if server in self.servers else self._times_stale.total()

    def _set_down(self, server: Server, trouble: str) -> None:
        if server.state is ServerState.READY:
            logger.warning("%s is out of use: %s", server.url, trouble)
        server.state, server.trouble = ServerState.DOWN, trouble

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something in the background that must end before the connections close."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
