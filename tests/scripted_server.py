"""Servers that answer `/generate` as told, for the client's bad days."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from megatron_trd.rollout.sglang import SGLangFleet

GOOD = {
    "text": "1 2",
    "output_ids": [4, 5],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 5},
        "weight_version": "v1",
        "output_token_logprobs": [[-0.5, 4, None], [-0.25, 5, None]],
    },
}
Reply = Callable[[dict[str, Any]], Any]


class Scripted:
    """A server that answers `/generate` as told and writes down what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.version = reply, "v1"
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.keys: set[str | None] = set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        if request.method == "GET":
            return web.json_response({"weight_version": self.version, "model_path": "m", "context_length": None})
        body = json.loads(await request.text())
        if request.path == "/abort_request":
            self.aborted.append(body["rid"])
        if request.path != "/generate":
            return web.json_response({})
        self.asked.append(body)
        answer = self.reply(body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


@asynccontextmanager
async def scripted(*replies: Reply) -> AsyncIterator[list[Scripted]]:
    servers, runners = [Scripted(reply) for reply in replies], []
    for server in servers:
        app = web.Application()
        app.router.add_route("*", "/{path}", server.handle)
        runners.append(runner := web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield servers
    finally:
        for runner in runners:
            await runner.cleanup()


def decode(ids: Sequence[int]) -> str:
    """Text that tells which ids it was made of."""
    return "-".join(map(str, ids))


def fleet_of(*urls: str, **settings: Any) -> SGLangFleet:
    defaults = {"request_timeout_s": 60.0, "retries": 2, "first_backoff_s": 0.01, "decode": decode}
    return SGLangFleet(urls, **{**defaults, **settings})


def good(_: dict[str, Any]) -> Any:
    return GOOD


def failing(status: int) -> Reply:
    return lambda _: web.json_response({"error": {"message": f"status {status} as told"}}, status=status)


async def hang(_: dict[str, Any]) -> Any:
    await asyncio.Event().wait()


def answer(ids: Sequence[int], spans: Sequence[tuple[str, int, int]], reason: str = "stop") -> dict[str, Any]:
    """A `/generate` answer whose log-probabilities are -id."""
    meta = {
        "finish_reason": {"type": reason, "message": "Aborted"} if reason == "abort" else {"type": reason},
        "weight_version": spans[-1][0],
        "weight_versions": [{"version": version, "start": start, "end": end} for version, start, end in spans],
        "output_token_logprobs": [[-float(i), i, None] for i in ids],
    }
    return {"text": "?", "output_ids": list(ids), "meta_info": meta}


def aborting(ids: Sequence[int] = (4, 5)) -> dict[str, Any]:
    """The answer to a request that was aborted after some tokens."""
    return answer(ids, [("v1", 0, len(ids))], "abort")
