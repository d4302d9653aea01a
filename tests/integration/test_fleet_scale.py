"""Thousands of requests at once: connections, requests in flight and what stays behind are bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_pool import MAX_REMEMBERED_PROMPTS
from scripted_server import GOOD, fleet_of

NUM, LIMIT = 5000, 64


class Counting:
    """A server that counts its connections and the requests in it."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.num_in_flight = self.most_in_flight = self.num_answered = 0

    async def handle(self, request: web.Request) -> web.Response:
        if request.path != "/generate":
            return web.json_response({"weight_version": "v1"})
        self.connections.add(request.transport)
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        await request.read()
        for _ in range(3):
            await asyncio.sleep(0)
        self.num_in_flight -= 1
        self.num_answered += 1
        return web.json_response(GOOD)


def test_five_thousand_requests_stay_within_the_window() -> None:
    async def main() -> None:
        server, app = Counting(), web.Application()
        app.router.add_route("*", "/{path}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with fleet_of(url, max_concurrent_requests=LIMIT) as fleet:
            await fleet.wait_healthy()
            params = SamplingParams(max_new_tokens=8)
            done = await asyncio.gather(*(fleet.generate((3, i), params) for i in range(NUM)))
            assert all(completion.token_ids == (4, 5) for completion in done)
            assert fleet.servers[0].num_in_flight == 0 and not fleet._tasks
            assert len(fleet._homes) == MAX_REMEMBERED_PROMPTS < NUM
        await runner.cleanup()
        assert server.num_answered == NUM and fleet.num_retries == 0
        assert LIMIT // 2 < server.most_in_flight <= LIMIT
        assert len(server.connections) <= LIMIT

    asyncio.run(asyncio.wait_for(main(), 120))
