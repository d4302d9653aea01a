"""One asyncio client for a fleet of servers that speak SGLang's HTTP API and hold the same model.

The one place with retries. A response is never sampled twice as long as its tokens are there: what a server broke off
goes on at another one, whatever weights that holds, and `Completion.weight_spans` tells which token came from which.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.log import get_logger
from megatron_trd.records import Completion
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.generate_wire import (
    NOTHING,
    Answer,
    Decode,
    joined,
    read_answer,
    require_fit,
    sampling_body,
    scoring_body,
)
from megatron_trd.rollout.server_client import PROBE_TIMEOUT_S, LostError, RefusedError, Server
from megatron_trd.rollout.server_pool import ServerPool
from megatron_trd.rollout.tries import Tries
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)


class SGLangFleet(ServerPool):
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
        hedge_after_s: float | None = None,
        api_key: str | None = None,
        router_url: str | None = None,
        vocab_size: int | None = None,
        decode: Decode | None = None,
        random: Random | None = None,
    ) -> None:
        """Remember the settings; nothing is sent.

        Args:
            request_timeout_s: deadline of each try of a request; all of them have (retries + 1) times as much.
            retries: further tries after a failed one, on another server where there is one; see `Tries`.
            max_concurrent_requests: requests in flight over all servers, hedges included.
            first_backoff_s: longest pause before the first retry; doubles with each.
            server_timeout_s: how long `wait_healthy` waits unless it is told otherwise.
            hedge_after_s: a request that is still running after this long is sent to a second server as well.
            api_key: what the servers ask for; None = nothing.
            router_url: an sglang-router that requests go to, instead of the servers themselves.
            vocab_size: ids of the served model, for servers that do not tell; a larger one would end a real server.
            decode: makes the text of a response that came in parts; without it such a response begins anew.
            random: source of the pauses' jitter.
        """
        super().__init__(urls, server_timeout_s=server_timeout_s, api_key=api_key, router_url=router_url)
        self.request_timeout_s, self.retries, self.first_backoff_s = request_timeout_s, retries, first_backoff_s
        self.hedge_after_s, self.vocab_size, self.decode = hedge_after_s, vocab_size, decode
        self.num_retries = 0
        self.num_continued = 0
        """Times a response that had broken off went on from its tokens."""
        self.num_hedges = 0
        self.num_thrown_away = 0
        """Answers that were refused because of the weights that they came from."""
        self._random = random or Random()
        self._slots = asyncio.Semaphore(max_concurrent_requests)

    @classmethod
    def from_config(
        cls, config: Config, role: Literal["student", "teacher"], tokenizer: PreTrainedTokenizerBase
    ) -> SGLangFleet:
        """Make the fleet of a run's student or teacher servers.

        Raises:
            ValueError: --server-api-key-file cannot be used.
        """
        rollout, model = config.rollout, config.model
        if role == "student":
            urls, router_url, model_path = rollout.student_urls, rollout.student_router_url, model.hf_checkpoint
        else:
            urls, router_url = rollout.teacher_urls, rollout.teacher_router_url
            model_path = model.teacher_hf_checkpoint or model.hf_checkpoint
        return cls(
            urls,
            request_timeout_s=rollout.request_timeout_s,
            retries=rollout.request_retries,
            max_concurrent_requests=rollout.max_concurrent_requests,
            server_timeout_s=rollout.server_timeout_s,
            hedge_after_s=rollout.hedge_after_s,
            api_key=None if rollout.server_api_key_file is None else _read_api_key(rollout.server_api_key_file),
            router_url=router_url,
            vocab_size=_read_vocab_size(model_path),
            decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        )

    async def __aenter__(self) -> SGLangFleet:
        """Open the session."""
        await self._open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the session, after the last aborts are sent."""
        await self._close()

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Sample one completion; see `RolloutEngine.generate`."""
        key, done = hash(tuple(prompt_ids)), NOTHING
        async with self._slots:
            tries = self._tries()
            try:
                while done.finish_reason == "abort":
                    if not self.accepts(done.weight_versions):  # accepted when they came, too old by now
                        self.num_thrown_away += 1
                        versions, done = ", ".join(done.weight_versions), NOTHING
                        await tries.failed(f"what there was of it came from weights {versions}")
                    self.num_continued += bool(done.token_ids)
                    answer = await self._ask(sampling_body(prompt_ids, params, done.token_ids), key, tries)
                    if answer.completion.finish_reason == "abort" and self.decode is None:
                        await tries.failed(f"it broke off: {answer.completion.error}")
                    else:
                        done = joined(done, answer.completion, params, self.decode or _cannot_decode)
            except ServerError as error:
                return replace(done, error=str(error))
        return done

    async def score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[float, ...]:
        """Return the served model's log-probability of each response token at T = 1. Raises ServerError."""
        answer = await self.ask(scoring_body(prompt_ids, response_ids), prompt_ids)
        scores = tuple(score for score in answer.prompt_logprobs[1:] if score is not None)
        if len(scores) != len(response_ids):
            raise ServerError(f"a server scored {len(scores)} of {len(response_ids)} tokens; is it an SGLang server?")
        return scores

    async def ask(self, body: Mapping[str, Any], prompt_ids: Sequence[int]) -> Answer:
        """Send a body of one's own to `/generate`; the prompt chooses the server. Raises ServerError."""
        async with self._slots:
            return await self._ask(body, hash(tuple(prompt_ids)), self._tries())

    def _tries(self) -> Tries:
        return Tries(self.retries, self.request_timeout_s, self.first_backoff_s, self._random)

    async def _ask(self, body: Mapping[str, Any], key: int, tries: Tries) -> Answer:
        """Send a body until it is answered, in full or in part. Raises RefusedError or GaveUpError."""
        last: Server | None = None
        while True:
            last = await self.choose(key, last, tries.timeout_s())
            try:
                if last is None:
                    raise ServerError("; ".join(map(str, self.servers)))
                return await self._race(last, body, tries)
            except RefusedError:
                raise
            except ServerError as error:
                await (tries.busy if _has_no_room(error) else tries.failed)(str(error))
                self.num_retries += 1

    async def _race(self, server: Server, body: Mapping[str, Any], tries: Tries) -> Answer:
        """Send to a server and, if that takes long while there is room, to a second one; the first answer wins."""
        racers = {self._launch(server, body, tries)}
        try:
            if self.hedge_after_s is not None and not tries.was_hedged:
                running = (await asyncio.wait(racers, timeout=self.hedge_after_s))[1]
                second = self.least_loaded(avoid=server)
                if running and second not in (None, server) and not self._slots.locked():
                    assert second is not None
                    tries.was_hedged = True
                    self.num_hedges += 1
                    await self._slots.acquire()
                    hedge = self._launch(second, body, tries)
                    hedge.add_done_callback(lambda _: self._slots.release())
                    racers.add(hedge)
            while True:
                done, racers = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
                good = [racer for racer in done if racer.exception() is None]
                if good or not racers:
                    return (good or list(done))[0].result()
        finally:
            for racer in racers:
                racer.cancel()
            await asyncio.gather(*racers, return_exceptions=True)

    def _launch(self, server: Server, body: Mapping[str, Any], tries: Tries) -> asyncio.Task[Answer]:
        def release(_: asyncio.Task[Answer]) -> None:
            server.num_in_flight -= 1

        task = asyncio.get_running_loop().create_task(self._try(server, body, tries.timeout_s()))
        server.num_in_flight += 1  # now: the next request that chooses a server must see it
        task.add_done_callback(release)
        return task

    async def _try(self, server: Server, body: Mapping[str, Any], timeout_s: float) -> Answer:
        """Send once, under a fresh rid, and learn about the server from what happens."""
        require_fit(server.url, body, server.vocab_size or self.vocab_size, server.context_length)
        rid, adapter, version = uuid.uuid4().hex, self.adapter, self.expected_version
        times_stale = self.times_stale(server)
        named = {"rid": rid} if adapter is None else {"rid": rid, "lora_path": adapter}
        try:
            raw = await server.post("/generate", {**body, **named}, timeout_s)
        except asyncio.CancelledError:
            self._spawn(self._abort(server, rid))
            raise
        except LostError as error:
            self._set_down(server, str(error))
            self._spawn(self._abort(server, rid))
            raise
        answer = read_answer(raw, server.url, None if adapter is None else version)
        self._require_right(server, answer, times_stale)
        if answer.completion.finish_reason == "abort" and not answer.completion.token_ids:
            raise ServerError(f"{server.url} aborted it: {answer.completion.error}")
        return answer

    def _require_right(self, server: Server, answer: Answer, times_stale: int) -> None:
        """Raise ServerError if the answer comes from weights that are wrong or that may have been half loaded."""
        held, versions = answer.weight_version, answer.completion.weight_versions
        if held is not None and not self._is_held(held):
            self._set_stale(server, f"answered with weights {held!r}, not {self.expected_version!r}")
            trouble = str(server)
        elif self.times_stale(server) != times_stale:
            trouble = f"{server.url} went out of use while it answered"
        elif not self.accepts(versions):
            trouble = f"{server.url} answered with tokens of weights {', '.join(versions)}"
        else:
            return
        self.num_thrown_away += 1
        raise ServerError(trouble)

    async def _abort(self, server: Server, rid: str) -> None:
        try:
            await server.post("/abort_request", {"rid": rid}, PROBE_TIMEOUT_S)
        except ServerError as error:
            logger.debug("abort of %s: %s", rid, error)


def _has_no_room(error: ServerError) -> bool:
    """Whether the server answered that it is well and full: HTTP 429, or SGLang's 503 beyond --max-queued-requests."""
    return "HTTP 429" in str(error) or "queue is full" in str(error)


def _cannot_decode(_: Sequence[int]) -> str:
    raise AssertionError("without decode, a response that broke off begins anew")


def _read_api_key(path: str) -> str:
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"--server-api-key-file {path}: {error}; give a readable text file") from error
    if not key or len(key.split()) > 1:
        raise ValueError(f"--server-api-key-file {path}: holds no single key; write the servers' --api-key into it")
    return key


def _read_vocab_size(model_path: str) -> int | None:
    """Return the rows of the embedding, which may be more than the tokenizer has entries."""
    config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config).get("vocab_size")
