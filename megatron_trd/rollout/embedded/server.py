"""SGLang's HTTP API on a CPU, for laptops and tests.

    python -m megatron_trd.rollout.embedded.server --model-path DIR --port 0

Answers the part of the wire that `sglang.py` speaks, with SGLang's fields, status codes and error bodies, so the
client cannot tell the difference. Unlike SGLang it answers HTTP 400 where a bad token id, a wrong shape or releasing
memory while busy would kill a real server, and where a real one skips a weight of unknown name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from aiohttp import web

from megatron_trd.rollout.embedded.bodies import errors_as_json, key_check
from megatron_trd.rollout.embedded.engine import EmbeddedEngine
from megatron_trd.rollout.embedded.generation import GenerationRoutes
from megatron_trd.rollout.embedded.updates import UpdateRoutes

MAX_BODY_BYTES = 1 << 30
VERSION = "embedded-cpu"
"""No number: clients take it for one that has all of SGLang's routes, weight-update sessions too."""


class EmbeddedServer:
    """The engine, its routes, and what the server tells about itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load the model. Must be made inside the running event loop."""
        self._args = args
        self._generation = GenerationRoutes()
        self.engine = self._generation.engine = EmbeddedEngine(
            args.model_path,
            self._generation.on_progress,
            weight_version=args.weight_version,
            max_running_requests=args.max_running_requests,
        )
        self.updates = UpdateRoutes(self.engine, args.dist_timeout, args.enable_memory_saver)

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        check = key_check(self._args.api_key, self._args.admin_api_key)
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[check, errors_as_json])
        for path in ("/health", "/health_generate", "/ready"):
            app.router.add_get(path, self.health)
        for path in ("/model_info", "/get_model_info"):
            app.router.add_get(path, self.model_info)
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, self.server_info)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/loads", self.loads)
        self._generation.add_to(app.router)
        self.updates.add_to(app.router)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine's thread runs."""
        return web.Response(status=200 if self.engine.is_alive else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        """What is served, and the version of the weights."""
        return web.json_response(
            {
                "model_path": self.engine.model_path,
                "served_model_name": self.engine.model_path,
                "tokenizer_path": self._args.model_path,
                "is_generation": True,
                "weight_version": self.engine.weight_version,
                "load_format": "auto",
                "model_type": self.engine.config.model_type,
                "architectures": self.engine.config.architectures,
                "vocab_size": self.engine.vocab_size,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        """The settings of the server."""
        return web.json_response(
            {
                "model_path": self.engine.model_path,
                "served_model_name": self.engine.model_path,
                "context_length": self.engine.context_length,
                "tp_size": 1,
                "dp_size": 1,
                "enable_lora": True,
                "enable_memory_saver": self._args.enable_memory_saver,
                "max_running_requests": self.engine.max_running_requests,
                "max_total_num_tokens": self._max_total_num_tokens,
                "disaggregation_mode": "null",
                "version": VERSION,
                "internal_states": [{}],
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """OpenAI's list of models."""
        model = {"id": self.engine.model_path, "object": "model", "max_model_len": self.engine.context_length}
        return web.json_response({"object": "list", "data": [model]})

    async def loads(self, request: web.Request) -> web.Response:
        """How busy the one rank is."""
        engine = self.engine
        num_running, num_waiting, num_tokens = await asyncio.wrap_future(
            engine.call(lambda: (engine.num_running, engine.num_waiting, engine.num_cached_tokens))
        )
        load = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": num_running,
            "num_waiting_reqs": num_waiting,
            "num_used_tokens": num_tokens,
            "num_total_tokens": num_tokens,
            "max_total_num_tokens": self._max_total_num_tokens,
            "max_running_requests": engine.max_running_requests,
            "token_usage": num_tokens / self._max_total_num_tokens,
            "utilization": num_running / engine.max_running_requests,
        }
        now = datetime.now(timezone.utc).isoformat()
        return web.json_response(
            {"timestamp": now, "version": VERSION, "accelerator": None, "num_accelerators": 1, "loads": [load]}
        )

    @property
    def _max_total_num_tokens(self) -> int:
        return self.engine.max_running_requests * self.engine.context_length


async def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = EmbeddedServer(args)
    runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, args.host, args.port, backlog=4096)
    await site.start()
    server.engine.start()
    url = f"http://{args.host}:{runner.addresses[0][1]}"
    if args.port_file:
        unfinished = Path(f"{args.port_file}.tmp")
        unfinished.write_text(url + "\n")
        os.replace(unfinished, args.port_file)
    print(url, flush=True)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await stop.wait()
    server.updates.groups.close()
    await asyncio.wrap_future(server.engine.call(server.engine.close))
    await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and serve."""
    parser = argparse.ArgumentParser(prog="embedded_server", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Hugging Face directory to serve")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = a free port, printed when ready")
    parser.add_argument("--port-file", help="file to write the URL to when ready")
    parser.add_argument("--weight-version", default="default", help="name of the weights at the start")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 1 is fastest for tiny models")
    parser.add_argument("--max-running-requests", type=int, default=1024, help="sequences decoded at once")
    parser.add_argument("--enable-memory-saver", action="store_true", help="allow /release_memory_occupation")
    parser.add_argument("--dist-timeout", type=float, default=60.0, help="seconds to wait for a trainer's broadcast")
    parser.add_argument("--api-key", help="demand `Authorization: Bearer KEY` on all routes but health checks")
    parser.add_argument("--admin-api-key", help="demand this key instead on routes that change the server")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()
