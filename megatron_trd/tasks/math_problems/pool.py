"""Worker processes for comparisons that may never end: each is killed at its deadline and replaced."""

from __future__ import annotations

import json
import multiprocessing
import queue
import subprocess
import sys
import threading
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_START_S = 120.0
"""Seconds that a worker may take to import SymPy on a busy machine."""


class GraderError(Exception):
    """A comparison came to no verdict: it was out of time or memory, or its process died."""


class MathWorkerPool:
    """A few processes that compare answers, one each at a time. Use it from any thread; close it at the end.

    Processes start with their first comparison. They are plain children that import nothing of the caller's main
    module, so a pool works under fork and spawn alike, beside CUDA and inside daemons.
    """

    def __init__(self, *, num_workers: int = 2, deadline_s: float = 8.0, memory_gib: float = 4.0) -> None:
        """Make a pool; no process starts yet.

        Args:
            num_workers: comparisons that run at the same time; further ones wait.
            deadline_s: seconds of a comparison, from the moment it has a worker.
            memory_gib: address space of a worker.

        Raises:
            ValueError: Math-Verify is not installed.
        """
        if find_spec("math_verify") is None:
            raise ValueError("math verifier: package math-verify is missing; pip install 'math-verify[antlr4_13_2]'")
        self.deadline_s = deadline_s
        self._limits = (deadline_s, memory_gib)
        self._workers = [_Worker() for _ in range(num_workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._closed = threading.Event()

    def ask(self, **request: Any) -> bool:
        """Have a worker compare; `request` is what `math_worker.main` reads.

        Raises:
            GraderError: no verdict.
        """
        worker = self._idle.get()
        try:
            reply = self._exchange(worker, json.dumps(request).encode())
        except BaseException:
            worker.stop()  # whatever happened: the next comparison gets a fresh process
            raise
        finally:
            self._idle.put(worker)
        if "error" in reply:
            raise GraderError(reply["error"])
        return reply["equal"]

    def _exchange(self, worker: _Worker, request: bytes) -> dict[str, Any]:
        for _ in range(2):  # a worker may have been killed from outside, which says nothing about the pair
            if self._closed.is_set():
                raise GraderError("the pool is closed")
            try:
                worker.start(*self._limits)
                return worker.exchange(request, self.deadline_s)
            except (EOFError, OSError):
                worker.stop()
        raise GraderError("its worker process died twice")

    def process_ids(self) -> list[int]:
        """Return the ids of the live workers."""
        processes = [worker.process for worker in self._workers]
        return [process.pid for process in processes if process is not None]

    def close(self) -> None:
        """Kill every worker and wait for its end; comparisons under way raise GraderError."""
        self._closed.set()
        for worker in self._workers:
            worker.kill()
        returned = [self._idle.get() for _ in self._workers]  # a thread at work gives its worker back first
        for worker in returned:
            worker.stop()
            self._idle.put(worker)

    def __enter__(self) -> MathWorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process and our end of its connection."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self, deadline_s: float, memory_gib: float) -> None:
        if self.process is not None:
            return
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs.fileno(), deadline_s, memory_gib)
        code = f"import sys; sys.path[:] = {sys.path!r}; from megatron_trd.tasks.math_problems.worker import main; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}main{arguments!r}"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = ours
        if not ours.poll(_START_S):
            raise GraderError(f"a worker was not ready after {_START_S:.0f} s")
        ours.recv_bytes()

    def exchange(self, request: bytes, deadline_s: float) -> dict[str, Any]:
        connection = self._connection
        if connection is None:
            raise EOFError
        connection.send_bytes(request)
        if not connection.poll(deadline_s):
            raise GraderError(f"no verdict within {deadline_s:g} s")
        return json.loads(connection.recv_bytes())

    def kill(self) -> None:
        """End the process; its connection reports that to the thread that reads it."""
        if (process := self.process) is not None:
            process.kill()

    def stop(self) -> None:
        """End the process and forget it; only for the thread that holds the worker."""
        self.kill()
        if self.process is not None:
            self.process.wait()
        if self._connection is not None:
            self._connection.close()
        self.process = self._connection = None
