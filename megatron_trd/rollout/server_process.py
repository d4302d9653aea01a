"""Servers as child processes that never outlive whoever started them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
GUARD = Path(__file__).with_name("process_guard.py")
CPU_SERVE = ROOT / "tools/sglang_cpu/serve.py"
STOP_GRACE_S = 15
LOG_TAIL_BYTES = 4000
CPU_FLAGS = {
    "--attention-backend": "torch_native",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--dtype": "float32",
    "--max-total-tokens": "16384",  # otherwise keys and values take most of the memory
    "--max-running-requests": "32",
    "--lora-backend": "torch_native",
    "--sleep-on-idle": None,  # otherwise an idle scheduler spins on a core
    "--skip-server-warmup": None,
}
"""What SGLang needs on a CPU, each unless the flag is given."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A server that runs as a child process, under a guard that ends it with its starter."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    """The guard: it ends when the server does, with its exit status."""
    log: IO[bytes]
    key_file: Path | None = None
    """Holds the API key until the server has read it; a command line is there for all to see."""

    @classmethod
    def spawn(cls, name: str, command: Sequence[str], url: str, log_path: str | Path | None = None) -> ServerProcess:
        """Start a command that will answer at `url`, without waiting for it; its output is added to the log."""
        log = open(log_path, "a+b", opener=_for_us_alone) if log_path else tempfile.TemporaryFile()  # noqa: SIM115
        guarded = [sys.executable, "-IS", str(GUARD), str(STOP_GRACE_S), *command]
        process = subprocess.Popen(
            guarded, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return cls(name=name, url=url, process=process, log=log)

    @classmethod
    def start(
        cls,
        model_path: str | Path,
        *,
        weight_version: str = "default",
        port: int | None = None,
        max_running_requests: int = 1024,
        flags: Sequence[str] = (),
        deadline_s: float = 120.0,
    ) -> ServerProcess:
        """Start an embedded server and wait until it answers.

        Args:
            port: None lets the system choose.
            flags: further flags of the embedded server.

        Raises:
            RuntimeError: it died or was not ready in time; the message ends with what it wrote.
        """
        port = port or free_port()
        command = [sys.executable, "-m", "megatron_trd.rollout.embedded.server"]
        command += ["--model-path", str(Path(model_path).resolve()), "--weight-version", weight_version]
        command += ["--port", str(port), "--max-running-requests", str(max_running_requests), *flags]
        server = cls.spawn(f"embedded server on {model_path}", command, f"http://127.0.0.1:{port}")
        server.wait_until_healthy(deadline_s)
        return server

    def wait_until_healthy(self, deadline_s: float) -> None:
        """Wait until /health answers 200; otherwise end the process.

        Raises:
            RuntimeError: it died or was not healthy in time; the message ends with the end of its log.
        """
        end = time.monotonic() + deadline_s
        while not self.is_healthy():
            try:
                self.process.wait(timeout=0.1)
                state = "died"
            except subprocess.TimeoutExpired:
                if time.monotonic() < end:
                    continue
                state = f"was not ready after {deadline_s:g} s"
            self.process.terminate()
            self.process.wait()
            tail = self.log_tail()
            self.stop()
            raise RuntimeError(f"{self.name} {state}; the end of its log:\n{tail}")
        self._forget_key()

    def is_healthy(self) -> bool:
        """Whether the process runs and /health answers 200."""
        if self.process.poll() is not None:
            return False
        try:
            with DIRECT.open(f"{self.url}/health", timeout=25) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):  # refused, reset, too slow, or HTTP 503
            return False

    def log_tail(self) -> str:
        """Return the last lines the server wrote; where they go on being written is not disturbed."""
        size = os.fstat(self.log.fileno()).st_size
        tail = os.pread(self.log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return tail.decode(errors="replace")

    def stop(self) -> None:
        """End the process: politely, then by force."""
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()
        self._forget_key()

    def _forget_key(self) -> None:
        if self.key_file is not None:
            self.key_file.unlink(missing_ok=True)


def spawn_sglang(
    model_path: str | Path,
    *,
    python: str | Path,
    device: str = "cpu",
    port: int | None = None,
    host: str = "127.0.0.1",
    tp: int = 1,
    weight_version: str = "default",
    api_key: str | None = None,
    flags: Sequence[str] = (),
    log_path: str | Path | None = None,
) -> ServerProcess:
    """Start SGLang without waiting for it; see `start_sglang`."""
    port = port or free_port(host)
    launcher = [str(CPU_SERVE)] if device == "cpu" else ["-m", "sglang.launch_server"]
    model = Path(model_path).resolve() if Path(model_path).exists() else model_path  # else a name on the hub
    command = [str(python), *launcher, "--model-path", str(model), "--device", device]
    command += ["--host", host, "--port", str(port), "--tp-size", str(tp), "--weight-version", weight_version, *flags]
    if device == "cpu":
        given = {flag.partition("=")[0] for flag in flags}
        defaults = [(flag, value) for flag, value in CPU_FLAGS.items() if flag not in given]
        command += [word for pair in defaults for word in pair if word is not None]
    key_file = None
    if api_key is not None:
        handle, name = tempfile.mkstemp(prefix="trd-key-", suffix=".yaml")  # for its owner alone to read
        os.write(handle, f"api-key: {json.dumps(api_key)}\n".encode())
        os.close(handle)
        key_file = Path(name)
        command += ["--config", name]
    url = f"http://{reachable(host)}:{port}"
    return replace(ServerProcess.spawn(f"SGLang on {model_path}", command, url, log_path), key_file=key_file)


def start_sglang(model_path: str | Path, *, deadline_s: float = 600.0, **settings: Any) -> ServerProcess:
    """Start SGLang and wait until it answers.

    Args:
        model_path: Hugging Face directory.
        deadline_s: seconds until /health must answer.
        settings: `python`, the interpreter that has SGLang; `device`, cuda or cpu; `port`, None lets the system choose;
            `host`, the address to bind; `tp`, ranks of tensor parallelism; `weight_version`, the name of the first
            weights; `api_key`, wanted by every route but /health; `flags`, further flags of SGLang, which override
            those of `CPU_FLAGS`; `log_path`, the file that its output is added to, else a nameless one.

    Raises:
        RuntimeError: it died or was not healthy in time; the message ends with the end of its log.
    """
    server = spawn_sglang(model_path, **settings)
    server.wait_until_healthy(deadline_s)
    return server


@contextmanager
def launch_sglang(model_path: str | Path, **settings: Any) -> Iterator[str]:
    """Serve a model with SGLang for the length of a `with` block, which gets its base URL; see `start_sglang`."""
    with running(start_sglang(model_path, **settings)) as (server,):
        yield server.url


@contextmanager
def launch_embedded_server(model_path: str | Path, *, weight_version: str = "default") -> Iterator[str]:
    """Serve a model from a child process for the length of a `with` block, which gets its base URL."""
    with running(ServerProcess.start(model_path, weight_version=weight_version)) as (server,):
        yield server.url


@contextmanager
def running(*servers: ServerProcess) -> Iterator[Sequence[ServerProcess]]:
    """End the servers after the block, all at once."""
    try:
        yield servers
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.stop()


def lora_flags(rank: int) -> list[str]:
    """Return SGLang's flags for adapters up to a rank on every linear layer of a block."""
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules", *LORA_TARGETS]


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on.

    A server takes so long to start that a port of the system's choice may have been given to another by then. So a
    connection to it is closed here: for a minute the system gives the port only to who asks for it by number.
    """
    with socket.create_server((host, 0), family=_family(host)) as listener:
        with socket.create_connection(listener.getsockname()[:2]):
            listener.accept()[0].close()
        port: int = listener.getsockname()[1]
        return port


def is_free(port: int, host: str) -> bool:
    """Whether a server could listen there."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def reachable(host: str) -> str:
    """Return the address under which this machine reaches what is bound to `host`, as it is written in a URL."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def sglang_python(environment: Mapping[str, str]) -> Path | None:
    """Return the interpreter that `tools/setup_sglang_cpu.sh` prepared: in TRD_SGLANG_VENV, else in .venv-sglang."""
    python = Path(environment.get("TRD_SGLANG_VENV") or ROOT / ".venv-sglang") / "bin/python"
    return python if python.exists() else None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
