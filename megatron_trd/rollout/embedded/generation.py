"""Routes of the embedded server that generate, or decide whether anything does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, cast, get_args

from aiohttp import web

from megatron_trd.rollout.embedded.batch import Request
from megatron_trd.rollout.embedded.bodies import BodyError, field, read_json
from megatron_trd.rollout.embedded.engine import EmbeddedEngine, PauseMode
from megatron_trd.rollout.embedded.wire import parse_generate, render

Inbox: TypeAlias = "asyncio.Queue[tuple[str, dict[str, Any]]]"
"""Request ids, and what the requests have to tell."""

FLUSH_POLL_S = 0.02
_STREAM = "text/event-stream"
_DONE = b"data: [DONE]\n\n"


class GenerationRoutes:
    """`/generate` and its kin, and the requests whose answers they await."""

    def __init__(self) -> None:
        """Must be made inside the running event loop; `engine` is set before the first request."""
        self.engine: EmbeddedEngine
        self._loop = asyncio.get_running_loop()
        self._inboxes: dict[str, Inbox] = {}

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register the routes."""
        router.add_route("POST", "/generate", self.generate)
        router.add_route("PUT", "/generate", self.generate)
        router.add_post("/abort_request", self.abort_request)
        router.add_post("/pause_generation", self.pause_generation)
        router.add_post("/continue_generation", self.continue_generation)
        router.add_route("*", "/flush_cache", self.flush_cache)

    def on_progress(self, requests: Sequence[Request]) -> None:
        """Take the engine's news, in its thread: what is rendered here is not half of the next token."""
        news = [(request.rid, render(request, self.engine)) for request in requests]
        self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for rid, answer in news:
            if rid in self._inboxes:
                self._inboxes[rid].put_nowait((rid, answer))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Sample or score; one object, or a list for a batch or n > 1; or a stream of them."""
        body = await read_json(request)
        try:
            requests, as_list = self._parse(body)
        except ValueError as problem:
            if not body.get("stream"):
                raise
            error = {"message": str(problem), "type": "invalid_request_error", "code": 400, "retryable": False}
            return web.Response(body=_event({"error": error}) + _DONE, content_type=_STREAM)
        async with self._submitted(requests) as inbox:
            if body.get("stream"):
                return await self._stream(request, inbox, [item.rid for item in requests], as_list)
            answers = dict([await inbox.get() for _ in requests])
        rendered = [answers[item.rid] for item in requests]
        return web.json_response(rendered if as_list else rendered[0])

    @staticmethod
    async def _stream(request: web.Request, inbox: Inbox, rids: list[str], as_list: bool) -> web.StreamResponse:
        """Send, after each token of each request, all that the request has so far."""
        response = web.StreamResponse(headers={"Content-Type": _STREAM})
        await response.prepare(request)
        num_left = len(rids)
        while num_left:
            rid, answer = await inbox.get()
            await response.write(_event(answer | ({"index": rids.index(rid)} if as_list else {})))
            num_left -= answer["meta_info"]["finish_reason"] is not None
        await response.write(_DONE)
        return response

    def _parse(self, body: Mapping[str, Any]) -> tuple[list[Request], bool]:
        requests, as_list = parse_generate(body, self.engine)
        rids = [item.rid for item in requests]
        if len(set(rids)) < len(rids):
            raise ValueError(f"Duplicate request IDs detected within the request: {rids}")
        if self._inboxes.keys() & set(rids):
            raise ValueError(f"Duplicate request ID detected: {rids}")
        return requests, as_list

    @asynccontextmanager
    async def _submitted(self, requests: Sequence[Request]) -> AsyncIterator[Inbox]:
        """Run requests and yield where their news arrive; what is unfinished at the end is aborted."""
        inbox: Inbox = asyncio.Queue()
        self._inboxes.update(dict.fromkeys((item.rid for item in requests), inbox))
        try:
            for item in requests:
                self.engine.submit(item)
            yield inbox
        finally:
            for item in requests:
                del self._inboxes[item.rid]
                if item.finish_reason is None:  # the client hung up
                    self.engine.call(partial(self.engine.abort, item.rid))

    async def abort_request(self, request: web.Request) -> web.Response:
        """End one request by its exact id, or all; also 200 for an unknown id."""
        body = await read_json(request)
        rid, is_all = field(body, "rid", str, ""), field(body, "abort_all", bool, False)
        if rid or is_all:
            await asyncio.wrap_future(self.engine.call(lambda: self.engine.abort(None if is_all else rid)))
        return web.Response()

    async def pause_generation(self, request: web.Request) -> web.Response:
        """Stop decoding: `abort` (default), `retract` or `in_place`."""
        mode = field(await read_json(request), "mode", str, "abort")
        if mode not in get_args(PauseMode):
            raise BodyError(f"mode must be one of {', '.join(get_args(PauseMode))}, not {mode!r}")
        await asyncio.wrap_future(self.engine.call(lambda: self.engine.pause(cast(PauseMode, mode))))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: web.Request) -> web.Response:
        """Decode again."""
        await read_json(request)
        await asyncio.wrap_future(self.engine.call(self.engine.resume))
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, request: web.Request) -> web.Response:
        """400 while requests run or wait; `timeout` seconds of patience."""
        try:
            deadline = time.monotonic() + float(request.query.get("timeout", 0))
        except ValueError as problem:
            raise BodyError(f"timeout: {problem}") from problem
        while not await asyncio.wrap_future(self.engine.call(lambda: self.engine.is_flushed)):
            if time.monotonic() >= deadline:
                return web.Response(text="Flush cache failed.\n", status=400)
            await asyncio.sleep(FLUSH_POLL_S)
        return web.Response(text="Cache flushed.\n")


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
