"""Does the sandbox hold on this machine? Tried out with small programs before the first one of a model runs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_trd.tasks.sandbox.jail import ENVIRONMENT
from megatron_trd.tasks.sandbox.job import Finished, Job, SandboxError

Run = Callable[[Job], Finished]

_REFERENCE_S = 0.25
"""What `_WORK` takes on an idle core of 2023, the start of Python included."""
_WORK = b"total = 0\nfor number in range(4_000_000):\n    total += number * number % 7\nprint(total)\n"
_TRIES, _MAX_SLOWNESS = 3, 10.0

_MANY = 4096
_FORBIDDEN = ("memory", "host loopback", "files", "write to /work", "write to /dev", "raise limits", "namespaces")
_SETTINGS = (  # below /proc/sys, the value that forbids namespaces, what helps
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "AppArmor forbids user namespaces: give /usr/bin/bwrap a profile with the rule userns, or run as root "
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("kernel/unprivileged_userns_clone", "0", "run as root sysctl kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "run as root sysctl user.max_user_namespaces=10000"),
)

_PROBE = b"""
MANY = 4096
import ctypes, json, os, resource, socket
found = {}
def attempt(name, action):
    try:
        found[name] = action()
    except (OSError, MemoryError, ValueError):
        found[name] = "refused"
def forks():
    readable, writable = os.pipe()
    try:
        for number in range(MANY):
            if os.fork() == 0:
                os.close(writable)
                os.read(readable, 1)
                os._exit(0)
    except OSError:
        return number
    finally:
        os.close(writable)
    return MANY
def connect():
    socket.create_connection(("127.0.0.1", int(open("/work/port").read())), timeout=5)
    return "done"
def fill(path):
    with open(path, "wb", 0) as file:
        written = 0
        while written < 1 << 30:
            written += file.write(bytes(1 << 20))
    return written
attempt("memory", lambda: len(bytearray(1 << 36)))
attempt("forks", forks)
attempt("host loopback", connect)
attempt("files", lambda: fill("/tmp/large"))
attempt("write to /work", lambda: open("/work/new", "w").write("x"))
attempt("write to /dev", lambda: open("/dev/new", "w").write("x"))
attempt("raise limits", lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20)))
attempt("namespaces", lambda: ctypes.CDLL(None).unshare(0x10000000) and "refused")
found["environment"] = sorted(entry.partition("=")[0] for entry in open("/proc/1/environ").read().split("\\0") if entry)
print(json.dumps(found))
"""


def check_isolation(run: Run) -> None:
    """Run a program that tries what must not work.

    Raises:
        SandboxError: bubblewrap does not start here, or something works that must not.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1]).encode()
        finished = run(Job(files={"main.py": _PROBE, "port": port}, timeout_s=60))
    if finished.ending == "failed":
        raise SandboxError(f"code sandbox: bubblewrap fails ({finished.error}); {_remedy(finished.error)}")
    if finished.ending != "exited" or finished.status != 0:
        text = finished.stderr.decode(errors="replace").strip()[-300:]
        raise SandboxError(
            f"code sandbox: its first program ended by {finished.ending}, status {finished.status} ({text}); give "
            "--code-python an interpreter that runs there"
        )
    if holes := _holes(json.loads(finished.stdout)):
        raise SandboxError(
            f"code sandbox: does not hold ({'; '.join(holes)}); use another kernel or container runtime, or run "
            "programs that you trust with --unsafe-code-execution"
        )


def measure_slowness(run: Run) -> float:
    """Return how many times slower than usual a program runs here, 1 to 10: the best of a few tries."""
    seconds = []
    for _ in range(_TRIES):
        finished = run(Job(files={"main.py": _WORK}, timeout_s=60))
        if finished.ending != "exited" or finished.status != 0:
            raise SandboxError(
                f"code sandbox: a short program ended by {finished.ending} {finished.error}, status {finished.status}; "
                "give --code-python an interpreter that runs there"
            )
        seconds.append(finished.seconds)
    return min(max(min(seconds) / _REFERENCE_S, 1.0), _MAX_SLOWNESS)


def _holes(found: Mapping[str, Any]) -> list[str]:
    holes = [f"{name}: {result}" for name, result in found.items() if name in _FORBIDDEN and result != "refused"]
    if found["forks"] == _MANY:
        holes.append(f"{_MANY} processes")
    if set(found["environment"]) - {*ENVIRONMENT, "PWD"}:
        holes.append(f"environment: {found['environment']}")
    return holes


def _remedy(error: str) -> str:
    """What helps against a failure of bubblewrap, by its message and the kernel's settings."""
    if "nknown option" in error:
        return "it is older than 0.8; install a newer one"
    for path, value, remedy in _SETTINGS:
        file = Path("/proc/sys", path)
        if file.is_file() and file.read_text().strip() == value:
            return remedy
    return (
        "in a container the runtime forbids namespaces: start it with docker run --security-opt seccomp=unconfined "
        "--security-opt systempaths=unconfined --security-opt apparmor=unconfined, or run programs that you trust with "
        "--unsafe-code-execution"
    )
