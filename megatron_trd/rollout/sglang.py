"""One asyncio client for a fleet of servers that speak SGLang's HTTP API and hold the same model.

Only READY servers get requests. The others are probed in passing and come back only with the expected weights.
The one place with retries.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import aiohttp

from megatron_trd.config.schema import RolloutConfig
from megatron_trd.log import get_logger
from megatron_trd.records import Completion
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import PROBE_TIMEOUT_S, LostError, RefusedError, Server, ServerState
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)

MAX_BACKOFF_S = 10.0
MAX_PROBE_GAP_S = 30.0


class GaveUpError(ServerError):
    """All tries of a request failed."""

    def __init__(self, message: str, partial: Mapping[str, Any] | None) -> None:
        """Keep the last answer that broke off, if there was one."""
        super().__init__(message)
        self.partial = partial


class SGLangFleet:
    """A `RolloutEngine` and the `WeightServers` behind it. An async context manager."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        request_timeout_s: float = 3600.0,
        retries: int = 3,
        max_concurrent_requests: int = 512,
        first_backoff_s: float = 0.5,
        server_timeout_s: float = 60.0,
    ) -> None:
        """Remember the settings; nothing is sent.

        Args:
            request_timeout_s: deadline of each try of a request.
            retries: further tries after a failed one, on another server where there is one.
            max_concurrent_requests: requests in flight over all servers.
            first_backoff_s: pause before the first retry; doubles with each.
            server_timeout_s: how long `wait_healthy` waits unless it is told otherwise.
        """
        self._urls = tuple(dict.fromkeys(urls))
        self.request_timeout_s, self.retries, self.first_backoff_s = request_timeout_s, retries, first_backoff_s
        self.server_timeout_s = server_timeout_s
        self.servers: list[Server] = []
        self.expected_version: str | None = None
        """Completions of any other version are thrown away; None until the first update: any version is right."""
        self.adapter: str | None = None
        """LoRA adapter that requests name."""
        self.num_retries = 0
        self._arriving_version: str | None = None
        self._slots = asyncio.Semaphore(max_concurrent_requests)
        self._probes: set[asyncio.Task[None]] = set()
        self._aborts: set[asyncio.Task[None]] = set()

    @classmethod
    def from_config(cls, urls: Sequence[str], rollout: RolloutConfig) -> SGLangFleet:
        """Make the fleet of a run."""
        return cls(
            urls,
            request_timeout_s=rollout.request_timeout_s,
            retries=rollout.request_retries,
            max_concurrent_requests=rollout.max_concurrent_requests,
            server_timeout_s=rollout.server_timeout_s,
        )

    async def __aenter__(self) -> SGLangFleet:
        """Open the session."""
        # Servers close idle connections (uvicorn: after 5 s): none may sleep through a training step and be used again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(connector=connector)
        self.servers = [Server(url, self._session) for url in self._urls]
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the session, after the last aborts are sent."""
        await asyncio.gather(*self._probes, *self._aborts)
        await self._session.close()

    # ------------------------------------------------------------- generation

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Sample one completion; see `RolloutEngine.generate`."""
        sampling: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
        }
        if params.stop_token_ids:
            sampling["stop_token_ids"] = list(params.stop_token_ids)
        if params.sampling_seed is not None:
            sampling["sampling_seed"] = params.sampling_seed
        try:
            answer = await self._ask(
                {"input_ids": list(prompt_ids), "sampling_params": sampling, "return_logprob": True}
            )
        except GaveUpError as error:
            return _completion(error.partial, str(error))
        except ServerError as error:
            return _completion(None, str(error))
        return _completion(answer, None)

    async def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[float, ...]:
        """Return the served model's log-probability of each response token at T = 1. Raises ServerError."""
        answer = await self._ask(
            {
                "input_ids": [*prompt_ids, *response_ids],
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": len(prompt_ids) - 1,
            }
        )
        return tuple(entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:])

    async def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a `/generate` body until it is answered in full. Raises RefusedError or GaveUpError."""
        errors: list[str] = []
        partial: dict[str, Any] | None = None
        last: Server | None = None
        async with self._slots:
            for attempt in range(self.retries + 1):
                if attempt:
                    self.num_retries += 1
                    await asyncio.sleep(min(self.first_backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S))
                last = await self._choose(avoid=last)
                if last is None:
                    errors.append("; ".join(map(str, self.servers)))
                    continue
                try:
                    _require_fit(last, body)
                    answer = await self._try(last, body)
                except RefusedError:
                    raise
                except ServerError as error:
                    errors.append(str(error))
                    continue
                reason = answer["meta_info"]["finish_reason"]
                if reason["type"] != "abort":
                    return answer
                partial = answer
                errors.append(f"{last.url} aborted it: {reason.get('message')}")
        raise GaveUpError(
            f"failed {len(errors)} times (--request-retries {self.retries}): {' | '.join(errors)}", partial
        )

    async def _try(self, server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send once, under a fresh rid, and learn about the server from what happens."""
        rid = uuid.uuid4().hex
        server.num_in_flight += 1
        try:
            answer = await server.post("/generate", {**body, "rid": rid}, self.request_timeout_s)
        except asyncio.CancelledError:
            self._spawn(self._abort(server, rid), self._aborts)
            raise
        except LostError as error:
            self._set_down(server, str(error))
            self._spawn(self._abort(server, rid), self._aborts)
            raise
        finally:
            server.num_in_flight -= 1
        if not isinstance(answer, dict) or "meta_info" not in answer:
            raise ServerError(f"{server.url}: its answer to /generate has no meta_info; is it an SGLang server?")
        versions = _versions(answer["meta_info"])
        if versions and not self._is_right(versions[-1]):
            self._set_stale(server, f"answered with weights {versions[-1]!r}, not {self.expected_version!r}")
            raise ServerError(str(server))
        return answer

    async def _abort(self, server: Server, rid: str) -> None:
        try:
            await server.post("/abort_request", {"rid": rid}, PROBE_TIMEOUT_S)
        except ServerError as error:
            logger.debug("abort of %s: %s", rid, error)

    # ------------------------------------------------------------- states

    async def _choose(self, avoid: Server | None) -> Server | None:
        """Return the least loaded READY server, another one than `avoid` if possible; probe the rest in passing."""
        now = time.monotonic()
        for server in self.servers:
            if server.state is not ServerState.READY and now >= server.probe_after:
                server.probe_after = now + server.probe_gap_s
                server.probe_gap_s = min(2 * server.probe_gap_s, MAX_PROBE_GAP_S)
                self._spawn(self._probe(server), self._probes)
        while not (ready := [s for s in self.servers if s.state is ServerState.READY]) and self._probes:
            await asyncio.wait(self._probes, return_when=asyncio.FIRST_COMPLETED)
        return min(ready, key=lambda s: (s is avoid, s.num_in_flight), default=None)

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
        if not any(server.state is ServerState.READY for server in self.servers):
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

    async def _probe(self, server: Server) -> None:
        """Ask a server who it is and decide its state; one that a failed update left paused is set going."""
        try:
            await server.read_info()
            if server.state is ServerState.STALE and self._is_right(server.weight_version):
                await server.continue_(PROBE_TIMEOUT_S)
        except ServerError as error:
            self._set_down(server, str(error))
        else:
            self._judge(server)

    def _judge(self, server: Server) -> None:
        if self._is_right(server.weight_version):
            server.state, server.trouble, server.probe_gap_s = ServerState.READY, "", 1.0
        else:
            self._set_stale(server, f"holds weights {server.weight_version!r}, not {self.expected_version!r}")

    def _is_right(self, version: str | None) -> bool:
        return self.expected_version is None or version in (self.expected_version, self._arriving_version)

    def _set_stale(self, server: Server, trouble: str) -> None:
        if server.state is not ServerState.STALE:
            logger.warning("%s is out of use: %s", server.url, trouble)
        server.state, server.trouble = ServerState.STALE, trouble

    def _set_down(self, server: Server, trouble: str) -> None:
        if server.state is ServerState.READY:
            logger.warning("%s is out of use: %s", server.url, trouble)
        server.state, server.trouble = ServerState.DOWN, trouble

    def begin_update(self, version: str) -> None:
        """See `WeightServers.begin_update`."""
        self._arriving_version = version

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

    def _spawn(self, coroutine: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        group.add(task)
        task.add_done_callback(group.discard)


def _require_fit(server: Server, body: Mapping[str, Any]) -> None:
    """Refuse here what would kill the server or be refused there, as far as it told its limits."""
    ids, budget = body["input_ids"], body["sampling_params"]["max_new_tokens"]
    if server.vocab_size is not None and not (ids and min(ids) >= 0 and max(ids) < server.vocab_size):
        raise RefusedError(
            f"the prompt is empty or has ids outside the vocabulary of {server.vocab_size} of {server.url}"
        )
    if server.context_length is not None and len(ids) + budget > server.context_length:
        raise RefusedError(
            f"prompt of {len(ids)} tokens and --max-response-tokens {budget}: exceed the context of "
            f"{server.context_length} tokens of {server.url}; lower the budget or serve a longer context"
        )


def _versions(meta: Mapping[str, Any]) -> tuple[str, ...]:
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version")}]
    return tuple(str(span["version"]) for span in spans if span["version"] is not None)


def _completion(answer: Mapping[str, Any] | None, error: str | None) -> Completion:
    if answer is None:
        return Completion(token_ids=(), text="", finish_reason="abort", error=error)
    meta = answer["meta_info"]
    return Completion(
        token_ids=tuple(answer["output_ids"]),
        text=answer.get("text", ""),
        finish_reason=meta["finish_reason"]["type"],
        logprobs=tuple(entry[0] for entry in meta["output_token_logprobs"]),
        weight_versions=_versions(meta),
        error=error,
    )
