"""One server over HTTP: what is known of it, and SGLang's control calls."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import aiohttp

from megatron_trd.log import get_logger
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)

CONTROL_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 30.0
FLUSH_GAP_S = 0.05
_AS_BUCKET: dict[str, Any] = {"load_format": "flattened_bucket", "flush_cache": False}  # flushed when brought to rest
FIRST_WITH_SESSIONS = (0, 5, 21)
"""SGLang takes tensors only between /begin_weight_update and /end_weight_update since this version."""


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

    def __init__(self, url: str, session: aiohttp.ClientSession, api_key: str | None = None) -> None:
        """Remember the address; nothing is sent."""
        self.url = url.rstrip("/")
        self.state = ServerState.DOWN
        self.trouble = "not contacted yet"
        self.weight_version: str | None = None
        self.vocab_size: int | None = None
        """As told by the server, like `context_length`; None if it does not tell."""
        self.context_length: int | None = None
        self.tp_size = 1
        self.version = "unknown"
        """Of the server's software."""
        self.num_in_flight = 0
        self.probe_after = 0.0
        self.probe_gap_s = 1.0
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def __str__(self) -> str:
        """Describe it for an error message."""
        return f"{self.url} is {self.state.value}" + (f" ({self.trouble})" if self.trouble else "")

    async def read_info(self) -> None:
        """Ask what it serves and within which limits; a paused server answers, too."""
        info = await self.model_info(PROBE_TIMEOUT_S)
        settings = await self.get("/server_info", PROBE_TIMEOUT_S)
        self.weight_version = str(info["weight_version"])
        self.vocab_size = info.get("vocab_size")
        self.context_length = settings.get("context_length") or await self._served_length()
        self.tp_size = settings.get("tp_size", 1)
        if self.version != (version := str(settings.get("version"))):
            self.version = version
            sessions = "weight-update sessions" if self.has_sessions else "no weight-update sessions"
            logger.info("%s runs version %s (%s), tensor-parallel size %d", self.url, version, sessions, self.tp_size)

    async def _served_length(self) -> int | None:
        """Return the context length from where SGLang tells it if no flag set it; None if it does not."""
        try:
            models = await self.get("/v1/models", PROBE_TIMEOUT_S)
        except RefusedError:
            return None
        return (models.get("data") or [{}])[0].get("max_model_len")

    async def check_health(self) -> None:
        """Have it generate a token. A paused SGLang server fails at that, after 20 s."""
        await self.get("/health", HEALTH_TIMEOUT_S)

    @property
    def has_sessions(self) -> bool:
        """Whether tensors must be sent within a weight-update session; true for versions that are no number."""
        number = re.match(r"(\d+)\.(\d+)\.(\d+)", self.version)
        return number is None or tuple(map(int, number.groups())) >= FIRST_WITH_SESSIONS

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
        """Drop all cached keys and values; asks again while requests are still on their way out.

        The server's own patience (`?timeout=`) is of no use: it waits for retracted requests too, which stay.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await self.post("/flush_cache", {}, max(0.1, deadline - time.monotonic()))
            except RefusedError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(FLUSH_GAP_S)

    async def begin_weight_update(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Open a weight-update session; one that an earlier failure left open is closed first."""
        if not self.has_sessions:
            return
        body = {"selector": "target"}
        try:
            await self.post("/begin_weight_update", body, timeout_s)
        except RefusedError as error:
            if "already open" not in str(error):
                raise
            await self.end_weight_update(timeout_s)
            await self.post("/begin_weight_update", body, timeout_s)

    async def end_weight_update(self, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Close it."""
        if self.has_sessions:
            await self.post("/end_weight_update", {}, timeout_s)

    async def update_weights_from_disk(self, path: str, version: str, timeout_s: float) -> None:
        """Load a Hugging Face directory that it can read, and name the weights `version`."""
        await self.post("/update_weights_from_disk", {"model_path": path, "weight_version": version}, timeout_s)

    async def update_weights_from_tensor(self, payloads: Sequence[str], timeout_s: float) -> None:
        """Load one flattened bucket, a base64 pickle for each tensor-parallel rank."""
        body = _AS_BUCKET | {"serialized_named_tensors": list(payloads)}
        await self.post("/update_weights_from_tensor", body, timeout_s)

    async def join_update_group(
        self, name: str, backend: str, address: str, port: int, first_rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Join a process group as ranks `first_rank`, `first_rank + 1`, ...; ends when all members are there."""
        body = {"group_name": name, "backend": backend, "master_address": address, "master_port": port}
        body |= {"rank_offset": first_rank, "world_size": world_size}
        await self.post("/init_weights_update_group", body, timeout_s)

    async def leave_update_group(self, name: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Leave it."""
        await self.post("/destroy_weights_update_group", {"group_name": name}, timeout_s)

    async def update_weights_from_distributed(
        self, group: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], timeout_s: float
    ) -> None:
        """Receive all of `names` as one tensor of bytes, broadcast by rank 0 of the group."""
        body = {"group_name": group, "names": list(names), "dtypes": list(dtypes), "shapes": list(map(list, shapes))}
        await self.post("/update_weights_from_distributed", _AS_BUCKET | body, timeout_s)

    async def load_adapter(
        self, name: str, config: Mapping[str, Any], payloads: Sequence[str], timeout_s: float
    ) -> None:
        """Hold another LoRA adapter: PEFT's configuration, and a base64 pickle of {name: tensor} for each rank."""
        body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": list(payloads)}
        await self.post("/load_lora_adapter_from_tensors", body, timeout_s)

    async def unload_adapter(self, name: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Drop a LoRA adapter."""
        await self.post("/unload_lora_adapter", {"lora_name": name}, timeout_s)

    async def name_weights(self, version: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Call the weights it holds `version` from now on; requests that wait go on."""
        body = {"new_version": version, "abort_all_requests": False}
        await self.post("/update_weight_version", body, timeout_s)

    async def weight_checksums(self, timeout_s: float = CONTROL_TIMEOUT_S) -> Mapping[str, str]:
        """Return a checksum of each parameter, under the server's own (fused) names, as `rank:name`."""
        answer = await self.post("/weights_checker", {"action": "checksum"}, timeout_s)
        sums = [rank["checksums"] for rank in answer["ranks"]]
        return {f"{rank}:{name}": value for rank, named in enumerate(sums) for name, value in named.items()}

    async def release_memory(self, tags: Sequence[str], timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Give GPU memory back: `kv_cache`, `weights`, `cuda_graph`. The server must be idle: a busy one dies."""
        await self.post("/release_memory_occupation", {"tags": list(tags)}, timeout_s)

    async def resume_memory(self, tags: Sequence[str], timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Take it again. Weights come back undefined and must be sent."""
        await self.post("/resume_memory_occupation", {"tags": list(tags)}, timeout_s)

    async def get(self, path: str, timeout_s: float) -> Any:
        """Return the JSON of an answer, or None if it is not JSON. Raises ServerError."""
        return await self._request("GET", path, None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        """Return the JSON of an answer, or None if it is not JSON. Raises ServerError."""
        return await self._request("POST", path, body, timeout_s)

    async def delete(self, path: str, timeout_s: float) -> Any:
        """Return the JSON of an answer, or None if it is not JSON. Raises ServerError."""
        return await self._request("DELETE", path, None, timeout_s)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        where = f"{method} {self.url}{path.partition('?')[0]}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            request = self._session.request(method, self.url + path, json=body, timeout=timeout, headers=self._headers)
            async with request as response:
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
        except ValueError as error:
            raise ServerError(f"{where}: its answer is not JSON: {error}") from error
