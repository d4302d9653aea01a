"""Run one job: feed it, watch its limits, end it, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_trd.tasks.sandbox.jail import ENVIRONMENT, Interpreter, bubblewrap_command, unsafe_command
from megatron_trd.tasks.sandbox.job import Ending, Finished, Job, Limits
from megatron_trd.tasks.sandbox.seccomp import filter_program
from megatron_trd.tasks.sandbox.usage import resident_bytes, waited_s

_TICK_S = 0.1
_CHUNK = 1 << 16
_PATIENCE = 3.0  # further time limits that a job may spend waiting for a core
_STATUS_BYTES = 4096
_ERROR_BYTES = 300


def run_in_bubblewrap(job: Job, limits: Limits, python: Interpreter) -> Finished:
    """Run `job` in a sandbox."""
    with contextlib.ExitStack() as stack:
        files = {name: _memory_file(stack, content) for name, content in job.files.items()}
        program = filter_program()
        seccomp = _memory_file(stack, program) if program else None
        pipes = _Pipes(stack, job)
        status = pipes.open("status")
        command = bubblewrap_command(job, limits, python, files=files, status=status, seccomp=seccomp)
        inherited = [*files.values(), *([seccomp] if seccomp is not None else [])]
        watch = _Watch(job, limits, pipes)
        watch.run(_start(stack, job, command, pipes, inherited, {}, "/"))
        report = _report(pipes.read["status"])
    if watch.ending == "exited" and "exit-code" not in report:
        error = pipes.read["stderr"].decode(errors="replace").strip()[-_ERROR_BYTES:]
        return Finished(ending="failed", error=error or f"bubblewrap ended with {watch.status}", seconds=watch.seconds)
    return watch.finished()


def run_unsafely(job: Job, limits: Limits, python: Interpreter) -> Finished:
    """Run `job` with resource limits alone: it can read files, use the network and leave processes behind."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        os.chmod(folder, 0o755)
        for name, content in job.files.items():
            Path(folder, name).write_bytes(content)
        pipes = _Pipes(stack, job)
        watch = _Watch(job, limits, pipes)
        command = unsafe_command(job, limits, python, folder=folder)
        watch.run(_start(stack, job, command, pipes, [], ENVIRONMENT, folder))
    return watch.finished()


class _Pipes:
    """What we read from a job: stdout, stderr, and where asked for records and bubblewrap's status."""

    def __init__(self, stack: contextlib.ExitStack, job: Job) -> None:
        self._stack = stack
        self.ours: dict[str, int] = {}
        self.theirs: dict[str, int] = {}
        self.read: dict[str, bytearray] = {}
        for name in ("stdout", "stderr", *(["records"] if job.records else [])):
            self.open(name)

    def open(self, name: str) -> int:
        ours, theirs = os.pipe()
        self._stack.callback(os.close, ours)
        self.ours[name], self.theirs[name], self.read[name] = ours, theirs, bytearray()
        return theirs

    def close_theirs(self) -> None:
        for descriptor in self.theirs.values():
            os.close(descriptor)
        self.theirs.clear()


def _start(
    stack: contextlib.ExitStack,
    job: Job,
    command: list[str],
    pipes: _Pipes,
    inherited: list[int],
    environment: Mapping[str, str],
    folder: str,
) -> subprocess.Popen[bytes]:
    """Start the command with an environment that holds nothing of ours: the program could read bubblewrap's."""
    stdin = _memory_file(stack, job.stdin)
    named = [pipes.theirs[name] for name in ("records", "status") if name in pipes.theirs]
    argument = [str(pipes.theirs["records"])] if job.records else []
    try:
        process = subprocess.Popen(
            [*command, *argument],
            env=environment,
            cwd=folder,
            stdin=stdin,
            stdout=pipes.theirs["stdout"],
            stderr=pipes.theirs["stderr"],
            pass_fds=[*inherited, *named],
            start_new_session=True,
        )
    finally:
        pipes.close_theirs()
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """The last resort of an interrupted run; a finished process is not touched."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _memory_file(stack: contextlib.ExitStack, content: bytes) -> int:
    """Return a descriptor of a file that lies in memory alone."""
    descriptor = os.memfd_create("job")
    stack.callback(os.close, descriptor)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _report(text: bytes | bytearray) -> dict[str, int]:
    """Read bubblewrap's status: one JSON object a line, the last of which may still be on its way."""
    report: dict[str, int] = {}
    for line in bytes(text).split(b"\n")[:-1]:
        report |= json.loads(line)
    return report


class _Watch:
    """Reads what a running job writes until it ends, and ends it at its limits."""

    def __init__(self, job: Job, limits: Limits, pipes: _Pipes) -> None:
        self.ending: Ending = "exited"
        self.status = 0
        self.seconds = 0.0
        self._pipes = pipes
        self._records = job.records
        self._memory = max(limits.memory_mib, job.memory_mib) * 2**20
        output = max(limits.output_kib, job.output_kib) * 1024
        self._caps = {"stdout": output, "stderr": output, "records": output, "status": _STATUS_BYTES}
        self._limit_s = job.timeout_s
        self._seen = 0
        self._deadline = self._latest = self._next_look = 0.0
        self._forgiven_s = 0.0

    def run(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the process has ended and all it wrote was read."""
        started = time.monotonic()
        self._begin_step(started)
        with selectors.DefaultSelector() as selector, _process_descriptor(process.pid) as ended:
            for name, descriptor in self._pipes.ours.items():
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ, name)
            selector.register(ended, selectors.EVENT_READ, None)
            running = True
            while running:
                names = [key.data for key, _ in selector.select(_TICK_S)]
                running = None not in names
                for name in names if running else list(self._pipes.ours):  # at its end, all that is left
                    if name in self._pipes.ours:
                        self._drain(name, selector, to_end=not running)
                if running and self.ending == "exited":
                    self._check(process)
                    if self.ending != "exited":
                        self._kill(process)
        if self._overflowing():
            self.ending = "output_limit"
        with contextlib.suppress(ProcessLookupError):  # without bubblewrap, what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        self.status = process.wait()
        self.seconds = time.monotonic() - started

    def finished(self) -> Finished:
        """Return how it ended."""
        read = {name: bytes(content) for name, content in self._pipes.read.items()}
        return Finished(
            ending=self.ending,
            status=self.status if self.status >= 0 else 128 - self.status,
            stdout=read["stdout"],
            stderr=read["stderr"],
            records=tuple(read.get("records", b"").split(b"\n")[:-1]),
            seconds=self.seconds,
        )

    def _drain(self, name: str, selector: selectors.BaseSelector, *, to_end: bool) -> None:
        content, cap = self._pipes.read[name], self._caps[name]
        while True:
            try:
                chunk = os.read(self._pipes.ours[name], _CHUNK)
            except BlockingIOError:
                return
            if not chunk:
                if self._pipes.ours[name] in selector.get_map():
                    selector.unregister(self._pipes.ours[name])
                return
            content += chunk[: cap - len(content) + 1]
            if len(content) > cap or not to_end:
                return

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        if self._overflowing():
            self.ending = "output_limit"
            return
        records = self._pipes.read.get("records", b"").count(b"\n")
        if self._seen < min(records, self._records):
            self._seen = records
            self._begin_step(now)
        root = self._first_process(process)
        if now > self._deadline:
            self._forgive_waiting(waited_s(root))
            if now > self._deadline:
                self.ending = "timeout"
        elif now > self._next_look:
            self._next_look = now + _TICK_S
            if resident_bytes(root) > self._memory:
                self.ending = "memory"

    def _overflowing(self) -> bool:
        return any(len(content) > self._caps[name] for name, content in self._pipes.read.items())

    def _begin_step(self, now: float) -> None:
        self._deadline = now + self._limit_s
        self._latest = self._deadline + _PATIENCE * self._limit_s
        self._next_look = now + _TICK_S

    def _forgive_waiting(self, waited_s: float) -> None:
        """Time without a core is not the program's; on a busy machine it is most of the time."""
        self._deadline = min(self._deadline + waited_s - self._forgiven_s, self._latest)
        self._forgiven_s = waited_s

    def _first_process(self, process: subprocess.Popen[bytes]) -> int:
        return _report(self._pipes.read.get("status", b"")).get("child-pid", process.pid)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the first process of the sandbox: the kernel then ends all others, and bubblewrap reaps it and ends."""
        first = self._first_process(process)
        if first == process.pid:
            _end(process)
            return
        with contextlib.suppress(ProcessLookupError), _process_descriptor(first) as descriptor:
            if _is_running(process.pid):  # so bubblewrap still keeps the number from going to another process
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@contextlib.contextmanager
def _process_descriptor(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
