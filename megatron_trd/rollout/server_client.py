"""One server over HTTP: what is known of it, and SGLang's control calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import Enum
from typing import Any

import aiohttp

from megatron_trd.weight_sync.base import ServerError

CONTROL_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 5.0


class ServerState(Enum):
    """Whether a server may be asked to generate."""

    READY = "ready"
    STALE = "stale"
    """It answers, but not with the expected weights."""
    DOWN = "down"


class RefusedError(ServerError):
    """HTTP 4xx: the request itself is wrong and must not be sent again."""


class LostError(ServerError):
    """No answer: the connection broke or the deadline passed."""


class Server:
    """A server's address, state and limits, and the calls that go to it alone."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        """Remember the address; nothing is sent."""
        self.url = url.rstrip("/")
        self.state = ServerState.DOWN
        self.trouble = "not contacted yet"
        self.weight_version: str | None = None
        self.vocab_size: int | None = None
        """As told by the server, like `context_length`; None if it does not tell."""
        self.context_length: int | None = None
        self.num_in_flight = 0
        self.probe_after = 0.0
        self.probe_gap_s = 1.0
        self._session = session

    def __str__(self) -> str:
        """Describe it for an error message."""
        return f"{self.url} is {self.state.value}" + (f" ({self.trouble})" if self.trouble else "")

    async def read_info(self) -> None:
        """Ask whether it is healthy, what it serves and within which limits."""
        await self.get("/health", PROBE_TIMEOUT_S)
        info = await self.model_info(PROBE_TIMEOUT_S)
        settings = await self.get("/server_info", PROBE_TIMEOUT_S)
        self.weight_version = str(info["weight_version"])
        self.vocab_size = info.get("vocab_size")
        self.context_length = settings.get("context_length")

    async def model_info(self, timeout_s: float = CONTROL_TIMEOUT_S) -> dict[str, Any]:
        """Return what it says it serves."""
        return await self.get("/model_info", timeout_s)

    async def read_weight_version(self, timeout_s: float = CONTROL_TIMEOUT_S) -> str:
        """Return the version of the weights it says it holds."""
        return str((await self.model_info(timeout_s))["weight_version"])

    async def pause(self, mode: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Stop decoding: `abort`, `retract` or `in_place`."""
        await self.post("/pause_generation", {"mode": mode}, timeout_s)

    async def continue_(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Decode again; harmless if it was not paused."""
        await self.post("/continue_generation", {}, timeout_s)

    async def flush(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Drop all cached keys and values; it may wait for running requests for most of the deadline."""
        await self.post(f"/flush_cache?timeout={0.9 * timeout_s:.3f}", {}, timeout_s)

    async def update_weights_from_disk(self, path: str, version: str, timeout_s: float) -> None:
        """Load a Hugging Face directory that it can read, and name the weights `version`."""
        await self.post("/update_weights_from_disk", {"model_path": path, "weight_version": version}, timeout_s)

    async def get(self, path: str, timeout_s: float) -> Any:
        """Return the JSON of an answer, or None if it is not JSON. Raises ServerError."""
        return await self._request("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        """Return the JSON of an answer, or None if it is not JSON. Raises ServerError."""
        return await self._request("POST", path, body, timeout_s)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        where = f"{method} {self.url}{path.partition('?')[0]}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                if response.status >= 400:
                    message = f"{where}: HTTP {response.status}: {(await response.text())[:500]}"
                    is_transient = response.status >= 500 or response.status in (408, 429)
                    raise (ServerError if is_transient else RefusedError)(message)
                if response.content_type == "application/json":
                    return await response.json()
                await response.read()
                return None
        except asyncio.TimeoutError as error:
            raise LostError(f"{where}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise LostError(f"{where}: {error or type(error).__name__}") from error
