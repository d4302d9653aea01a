"""SGLang's HTTP API on a CPU, for laptops and tests.

    python -m megatron_trd.rollout.embedded_server --model-path DIR --port 0

Answers the subset of the wire that `sglang.py` speaks, with SGLang's error bodies, so the client cannot tell the
difference. Unlike SGLang it answers HTTP 400 where a bad token id would kill a real server.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from aiohttp import web

from megatron_trd.rollout.embedded_batch import Request
from megatron_trd.rollout.embedded_engine import EmbeddedEngine
from megatron_trd.rollout.embedded_wire import parse_generate, render

T = TypeVar("T")
MAX_BODY_BYTES = 256 << 20


class EmbeddedServer:
    """The routes, and the requests whose answers they await."""

    def __init__(self, model_path: str, weight_version: str, max_running_requests: int) -> None:
        """Load the model. Must be made inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._answers: dict[str, asyncio.Future[None]] = {}
        self.engine = EmbeddedEngine(
            model_path,
            lambda finished: self._loop.call_soon_threadsafe(self._wake, finished),
            weight_version=weight_version,
            max_running_requests=max_running_requests,
        )

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        for path in ("/health", "/health_generate", "/ready"):
            app.router.add_get(path, self.health)
        for path in ("/model_info", "/get_model_info"):
            app.router.add_get(path, self.model_info)
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, self.server_info)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/generate", self.generate)
        app.router.add_route("*", "/flush_cache", self.flush_cache)
        app.router.add_post("/pause_generation", self.pause_generation)
        app.router.add_post("/continue_generation", self.continue_generation)
        app.router.add_post("/abort_request", self.abort_request)
        app.router.add_post("/update_weights_from_disk", self.update_weights_from_disk)
        app.router.add_post("/update_weight_version", self.update_weight_version)
        app.router.add_route("*", "/weights_checker", self.weights_checker)
        return app

    # ------------------------------------------------------------- generation

    async def generate(self, request: web.Request) -> web.Response:
        """Sample or score; one object, or a list for a batch or n > 1."""
        body = await _json(request)
        if not self.engine.is_alive:
            return _error("The engine has stopped.", 503)
        requests, as_list = parse_generate(body, self.engine)
        rids = [r.rid for r in requests]
        if len(set(rids)) < len(rids) or self._answers.keys() & set(rids):
            raise ValueError(f"Duplicate request ID detected: {rids}")
        answers = [self._loop.create_future() for _ in requests]
        self._answers.update(zip(rids, answers, strict=True))
        try:
            for item in requests:
                self.engine.submit(item)
            await asyncio.gather(*answers)
        except asyncio.CancelledError:  # the client hung up
            for rid in rids:
                self.engine.call(partial(self.engine.abort, rid))
            raise
        finally:
            for rid in rids:
                self._answers.pop(rid, None)
        rendered = [render(item, self.engine, bool(body.get("return_logprob"))) for item in requests]
        return web.json_response(rendered if as_list else rendered[0])

    def _wake(self, finished: Sequence[Request]) -> None:
        for request in finished:
            answer = self._answers.get(request.rid)
            if answer is not None and not answer.done():
                answer.set_result(None)

    async def abort_request(self, request: web.Request) -> web.Response:
        """End one request by its exact id, or all; also 200 for an unknown id."""
        body = await _json(request)
        if body.get("abort_all"):
            await self._call(lambda: self.engine.abort(None))
        elif body.get("rid"):
            await self._call(lambda: self.engine.abort(body["rid"]))
        return web.Response()

    # ------------------------------------------------------------- control

    async def flush_cache(self, request: web.Request) -> web.Response:
        """400 while requests run or wait; `timeout` seconds of patience."""
        deadline = time.monotonic() + float(request.query.get("timeout", 0))
        while not await self._call(lambda: self.engine.is_flushed):
            if time.monotonic() >= deadline:
                return web.Response(text="Flush cache failed.\n", status=400)
            await asyncio.sleep(0.02)
        return web.Response(text="Cache flushed.\n")

    async def pause_generation(self, request: web.Request) -> web.Response:
        """Stop decoding: `abort` (default), `retract` or `in_place`."""
        mode = (await _json(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise ValueError(f"mode must be abort, retract or in_place, not {mode!r}")
        await self._call(lambda: self.engine.pause(mode))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: web.Request) -> web.Response:
        """Decode again."""
        await self._call(self.engine.resume)
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        """Load a directory of safetensors; on 400 the old weights stay."""
        body = await _json(request)
        path = body.get("model_path")
        if not isinstance(path, str):
            return _outcome(False, "model_path must be given")
        if body.get("abort_all_requests"):
            await self._call(lambda: self.engine.abort(None))
        loading = await self._call(lambda: self.engine.load_weights(path, body.get("weight_version")))
        error = await _error_of(loading)
        if error is not None:
            return _outcome(False, f"Failed to update weights from {path}: {error}. The old weights stay.")
        return _outcome(True, "Succeeded to update model weights.", num_paused_requests=0)

    async def update_weight_version(self, request: web.Request) -> web.Response:
        """Rename the weights; aborts everything unless told otherwise, as SGLang does."""
        body = await _json(request)
        version = body.get("new_version")
        if not isinstance(version, str):
            return _outcome(False, "new_version must be given")

        def rename() -> None:
            if body.get("abort_all_requests", True):
                self.engine.abort(None)
            self.engine.weight_version = version

        await self._call(rename)
        return _outcome(True, f"Weight version updated to {version}", new_version=version)

    async def weights_checker(self, request: web.Request) -> web.Response:
        """Checksums of all weights."""
        body = await _json(request) if request.can_read_body else {}
        if body.get("action", "checksum") != "checksum":
            return _outcome(False, "the embedded server knows the action checksum only")
        checksums = await self._call(self.engine.checksums)
        whole = hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
        return _outcome(True, "Success.", ranks=[{"checksums": checksums}], per_engine_checksum=whole)

    # ------------------------------------------------------------- information

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine's thread runs."""
        return web.Response(status=200 if self.engine.is_alive else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        """What is served, and the version of the weights."""
        return web.json_response(
            {
                "model_path": self.engine.model_path,
                "served_model_name": self.engine.model_path,
                "tokenizer_path": self.engine.model_path,
                "is_generation": True,
                "weight_version": self.engine.weight_version,
                "model_type": self.engine.model.config.model_type,
                "architectures": self.engine.model.config.architectures,
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
                "disaggregation_mode": "null",
                "version": "embedded-cpu",
                "internal_states": [{}],
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """OpenAI's list of models."""
        model = {"id": self.engine.model_path, "object": "model", "max_model_len": self.engine.context_length}
        return web.json_response({"object": "list", "data": [model]})

    async def _call(self, action: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.engine.call(action))


async def _error_of(loading: Any) -> BaseException | None:
    await asyncio.wait([waiting := asyncio.wrap_future(loading)])
    return waiting.exception()


async def _json(request: web.Request) -> Any:
    text = await request.text()
    return json.loads(text) if text else {}


def _error(message: str, status: int) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def _outcome(success: bool, message: str, **more: Any) -> web.Response:
    return web.json_response({"success": success, "message": message, **more}, status=200 if success else 400)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValueError as error:  # malformed JSON is one too
        return _error(str(error), 400)


async def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = EmbeddedServer(args.model_path, args.weight_version, args.max_running_requests)
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
    await asyncio.wrap_future(server.engine.call(server.engine.close))
    await runner.cleanup()


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that runs as a child process."""

    url: str
    process: subprocess.Popen[str]

    @classmethod
    def start(
        cls,
        model_path: str | Path,
        *,
        weight_version: str = "default",
        port: int = 0,
        max_running_requests: int = 1024,
        deadline_s: float = 120.0,
    ) -> ServerProcess:
        """Start a server and wait until it answers.

        Raises:
            RuntimeError: it died or was not ready in time; the message ends with what it wrote to stderr.
        """
        command = [sys.executable, "-m", "megatron_trd.rollout.embedded_server"]
        command += ["--model-path", str(Path(model_path).resolve()), "--weight-version", weight_version]
        command += ["--port", str(port), "--max-running-requests", str(max_running_requests)]
        with tempfile.TemporaryFile("w+") as stderr:
            process = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], deadline_s)
            server = cls(process.stdout.readline().strip() if ready else "", process)
            if not server.url:
                server.stop()
                stderr.seek(0)
                state = "died" if ready else f"was not ready after {deadline_s:g} s"
                raise RuntimeError(f"embedded server on {model_path} {state}:\n{stderr.read()[-4000:]}")
            return server

    def stop(self) -> None:
        """End the process: politely, then by force."""
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def launch_embedded_server(model_path: str | Path, *, weight_version: str = "default") -> Iterator[str]:
    """Serve a model from a child process for the length of a `with` block, which gets its base URL."""
    server = ServerProcess.start(model_path, weight_version=weight_version)
    try:
        yield server.url
    finally:
        server.stop()


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
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()
