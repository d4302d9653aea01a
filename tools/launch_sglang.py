"""Starts SGLang servers, prints their URLs when all of them answer, and ends them with itself.

    python tools/launch_sglang.py --model-path DIR --role student --num-servers 2 [any flag of SGLang]

Prints a line `role url` for each server; --urls-file gets one URL a line and is there while the servers are. SIGTERM
and Ctrl-C end the servers, and so does the death of this process in any other way.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_trd.rollout.server_process import (
    ServerProcess,
    free_port,
    is_free,
    lora_flags,
    reachable,
    running,
    sglang_python,
    spawn_sglang,
)

LONGEST_PAUSE_S = 60.0
POLL_S = 0.5


class KeptServer:
    """A server that can be started again where it dies, after a pause that doubles from death to death."""

    def __init__(self, spawn: Callable[[], ServerProcess], deadline_s: float) -> None:
        """Start it; it has `deadline_s` to become healthy, each time."""
        self._spawn = spawn
        self._deadline_s = deadline_s
        self._pause_s = 1.0
        self._begin()

    def _begin(self) -> None:
        self.process = self._spawn()
        self._since = time.monotonic()
        self._is_ready = False
        self._is_dead = False

    def wait(self) -> None:
        """Wait until it is healthy, see `ServerProcess.wait_until_healthy`."""
        self.process.wait_until_healthy(self._deadline_s)
        self._is_ready = True

    def look(self, restart: bool) -> bool:
        """Notice a death and, with `restart`, start the server again in its time; return whether it lives or will."""
        age_s = time.monotonic() - self._since
        if self._is_dead:
            if restart and age_s > self._pause_s:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._begin()
        elif self.process.process.poll() is not None:
            print(
                f"{self.process.url} died; the end of its log:\n{self.process.log_tail()}", file=sys.stderr, flush=True
            )
            self.process.stop()
            self._pause_s = 1.0 if age_s > LONGEST_PAUSE_S else self._pause_s
            self._since, self._is_dead = time.monotonic(), True
        elif not self._is_ready and self.process.is_healthy():
            self.wait()
            print(f"{self.process.url} answers again", file=sys.stderr, flush=True)
        elif not self._is_ready and age_s > self._deadline_s:
            self.process.process.terminate()
        return restart or not self._is_dead


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end; return the exit status."""
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    try:
        ports, settings = _ports(args), _settings(args, flags)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit(0))
    args.log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix=f"sglang-{args.role}-"))
    args.log_dir.mkdir(parents=True, exist_ok=True)
    print(f"logs in {args.log_dir}", file=sys.stderr, flush=True)
    servers: list[KeptServer] = []
    try:
        for index, port in enumerate(ports):
            own_gpus = ["--base-gpu-id", str(index * args.tp)] if args.device == "cuda" else []
            own = {"port": port, "flags": [*own_gpus, *settings["flags"]], "log_path": args.log_dir / f"{port}.log"}
            servers.append(KeptServer(partial(spawn_sglang, args.model_path, **settings | own), args.deadline_s))
        for server in servers:
            server.wait()
        _announce(args, ports)
        _keep(servers, args.restart)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if args.urls_file:
            args.urls_file.unlink(missing_ok=True)
        with running(*(server.process for server in servers)):
            pass


def _announce(args: argparse.Namespace, ports: Sequence[int]) -> None:
    host = socket.gethostname() if args.host in ("0.0.0.0", "::") else reachable(args.host)
    urls = [f"http://{host}:{port}" for port in ports]
    if args.urls_file:
        unfinished = args.urls_file.with_name(f"{args.urls_file.name}.tmp")
        unfinished.write_text("".join(f"{url}\n" for url in urls))
        unfinished.replace(args.urls_file)
    print(*(f"{args.role} {url}" for url in urls), sep="\n", flush=True)


def _keep(servers: Sequence[KeptServer], restart: bool) -> NoReturn:
    while sum(server.look(restart) for server in servers):
        time.sleep(POLL_S)
    raise RuntimeError("no server is left; with --restart a dead one is started again")


def _ports(args: argparse.Namespace) -> list[int]:
    if not args.ports:
        return [free_port(args.host) for _ in range(args.num_servers)]
    if len(set(args.ports)) != args.num_servers:
        raise ValueError(f"--ports {' '.join(map(str, args.ports))}: give as many different ones as --num-servers")
    for port in args.ports:
        if not is_free(port, args.host):
            raise ValueError(f"--ports {port}: another process listens there; end it or choose another port")
    return list(args.ports)


def _settings(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Return what all servers have in common, as `spawn_sglang` takes it."""
    if not args.api_key_file and not _is_loopback(args.host):
        raise ValueError(
            f"--host {args.host}: other machines reach it, and whoever reaches a server can replace its weights; "
            "give --api-key-file, or bind 127.0.0.1"
        )
    key = args.api_key_file.read_text().strip() if args.api_key_file else None
    if key == "":
        raise ValueError(f"--api-key-file {args.api_key_file}: it is empty; write the key on its first line")
    if args.role == "eval" and args.device == "cuda":
        flags = ["--enable-deterministic-inference", *flags]  # a sample's seed acts with it alone
    return {
        "python": args.python or (sglang_python(os.environ) if args.device == "cpu" else None) or sys.executable,
        "device": args.device,
        "host": args.host,
        "tp": args.tp,
        "weight_version": args.weight_version,
        "api_key": key,
        "flags": [*(lora_flags(args.lora_rank) if args.lora_rank else ()), *flags],
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch_sglang", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--model-path", required=True, help="Hugging Face directory or name")
    add("--role", choices=("student", "teacher", "eval"), default="student", help="what the servers are for")
    add("--num-servers", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1, help="GPUs of each server")
    add("--host", default="127.0.0.1", help="address to bind; one that others reach takes --api-key-file")
    add("--ports", "--port", type=int, nargs="+", help="one for each server; default: free ones")
    add("--urls-file", type=Path, help="file to write the URLs to when all servers answer")
    add("--log-dir", type=Path, help="where each server's <port>.log goes; default: a new directory")
    add("--api-key-file", type=Path, help="file with the key that requests must bear")
    add("--restart", action="store_true", help="start a dead server again, at its port and with its first weights")
    add("--weight-version", default="default", help="name of the weights at the start")
    add("--lora-rank", type=int, default=0, help="largest rank of adapters on every linear layer; 0 = no adapters")
    add("--python", type=Path, help="interpreter that has SGLang; default on a CPU: that of tools/setup_sglang_cpu.sh")
    add("--deadline-s", type=float, default=1800.0, help="seconds until a started server must answer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
