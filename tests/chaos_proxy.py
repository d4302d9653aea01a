"""A proxy before one server that misbehaves at random, as networks and servers do; seeded."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import aiohttp
from aiohttp import web

OLD_VERSION = "a-version-of-long-ago"
ANY_ROUTE = ("drop", "hang", "drop_after_headers", "truncate", "delay", "500", "503", "garbage")
GENERATE = (*ANY_ROUTE, "full", "no_sense", "old_version", "abort", "abort")


class ChaosProxy:
    """Forwards to a server, except when it does not."""

    def __init__(self, target: str, seed: int, generate_rate: float, control_rate: float) -> None:
        self.target, self.url = target, ""
        self.rates = {True: generate_rate, False: control_rate}
        self.random = Random(seed)
        self.faults: Counter[str] = Counter()
        self.calm = True
        """No faults while it is."""
        self._session: aiohttp.ClientSession
        self._aborts: set[asyncio.Task[Any]] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        is_generate = request.path == "/generate"
        if self.calm or self.random.random() >= self.rates[is_generate]:
            return await self._forward(request, body)
        fault = self.random.choice(GENERATE if is_generate else ANY_ROUTE)
        self.faults[fault] += 1
        match fault:
            case "drop":
                return self._cut(request)
            case "hang":
                await asyncio.Event().wait()  # until the client hangs up
            case "delay":
                await asyncio.sleep(self.random.uniform(0, 0.3))
            case "500" | "503":
                return web.json_response({"error": {"message": f"chaos {fault}"}}, status=int(fault))
            case "full":
                return web.json_response({"error": {"message": "The request queue is full."}}, status=503)
            case "garbage":
                return web.Response(body=b'{"text": "1 2', content_type="application/json")
            case "no_sense":
                return web.json_response({"text": "1 2", "meta_info": {}})
            case "abort":
                self._abort_soon(json.loads(body)["rid"])
        answer = await self._forward(request, body)
        if fault == "old_version":
            return self._relabelled(answer)
        if fault in ("drop_after_headers", "truncate"):
            return await self._send_a_part(request, answer, fault == "truncate")
        return answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        try:
            async with self._session.request(
                request.method, self.target + request.path_qs, data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        except aiohttp.ClientError:  # the server is dead
            return self._cut(request)

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _send_a_part(self, request: web.Request, answer: web.Response, some_body: bool) -> web.StreamResponse:
        content = bytes(answer.body or b"")
        torn = web.StreamResponse(status=answer.status)
        torn.content_type, torn.content_length = answer.content_type, len(content) + 1
        await torn.prepare(request)
        if some_body:
            await torn.write(content[: len(content) // 2])
        self._cut(request)
        return torn

    @staticmethod
    def _relabelled(answer: web.Response) -> web.Response:
        raw = json.loads(bytes(answer.body or b"{}"))
        if "meta_info" in raw:
            raw["meta_info"]["weight_version"] = OLD_VERSION
            for span in raw["meta_info"]["weight_versions"]:
                span["version"] = OLD_VERSION
        return web.json_response(raw, status=answer.status)

    def _abort_soon(self, rid: str) -> None:
        async def abort() -> None:
            await asyncio.sleep(self.random.uniform(0.01, 0.1))
            async with self._session.post(f"{self.target}/abort_request", json={"rid": rid}) as answer:
                await answer.read()

        task = asyncio.get_running_loop().create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


@asynccontextmanager
async def chaos(
    *targets: str, seed: int, generate_rate: float = 0.3, control_rate: float = 0.05
) -> AsyncIterator[list[ChaosProxy]]:
    """Put a proxy before each server; they begin calm."""
    proxies = [ChaosProxy(target, seed + i, generate_rate, control_rate) for i, target in enumerate(targets)]
    runners = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for proxy in proxies:
            proxy._session = session
            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{path:.*}", proxy.handle)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield proxies
        finally:
            for runner in runners:
                await runner.cleanup()
            for proxy in proxies:
                await asyncio.gather(*proxy._aborts, return_exceptions=True)
