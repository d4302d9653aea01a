"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Ending = Literal["exited", "timeout", "memory", "output_limit", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one job may use; the same for all jobs of a sandbox."""

    memory_mib: int = 1024
    """Address space of each process, and resident memory of all together."""
    processes: int = 32
    """Processes and threads."""
    file_mib: int = 16
    """Each file; /tmp holds four times as much, /dev/shm as much."""
    open_files: int = 64
    output_kib: int = 1024
    """Standard output, and as much of standard error; `Job.output_kib` may ask for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a Python program that nobody trusts."""

    files: Mapping[str, bytes]
    """Name -> content of what lies, read-only, in /work; `main.py` is run."""
    stdin: bytes = b""
    timeout_s: float = 10.0
    """Seconds that it may take, on an idle machine of common speed."""
    records: int = 0
    """Lines that the program may write to a private descriptor, its only argument; each starts the clock anew.
    0 = there is no such descriptor."""
    output_kib: int = 0
    """Allowed output where it is more than `Limits.output_kib`."""
    memory_mib: int = 0
    """Allowed memory where it is more than `Limits.memory_mib`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a job ended."""

    ending: Ending
    """`exited`: by itself; `failed`: it never ran, or what ran it was killed, so nothing is known about it."""
    status: int = 0
    """Exit status of one that `exited`; 128 + signal of one that a signal ended."""
    stdout: bytes = b""
    stderr: bytes = b""
    records: tuple[bytes, ...] = ()
    """Complete lines from the private descriptor, without their ends."""
    seconds: float = 0.0
    error: str = ""
    """Why it `failed`."""


class SandboxError(ValueError):
    """No safe place to run programs; the text names what failed and the remedy."""
