"""A safe place to run programs that a model wrote."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

from megatron_trd.log import get_logger
from megatron_trd.tasks.sandbox.jail import find_interpreter
from megatron_trd.tasks.sandbox.job import Finished, Job, Limits
from megatron_trd.tasks.sandbox.probe import check_isolation, measure_slowness
from megatron_trd.tasks.sandbox.process import run_in_bubblewrap, run_unsafely

logger = get_logger(__name__)
_shared_lock = threading.Lock()


def shared_sandbox(*, python: str | None = None, unsafe: bool = False) -> Sandbox:
    """Return the sandbox that all callers of this process share, so that together they use no more than its cores.

    Raises:
        SandboxError: see `Sandbox`.
    """
    with _shared_lock:
        return _make_sandbox(os.getpid(), python, unsafe)


@lru_cache
def _make_sandbox(process_id: int, python: str | None, unsafe: bool) -> Sandbox:
    return Sandbox(python=python, unsafe=unsafe)


class Sandbox:
    """Runs untrusted Python programs, each in a bubblewrap sandbox of its own, as many at a time as there are cores.

    A program sees an empty machine: no network, no environment, no files but /usr, its own and 64 MiB in /tmp. Use one
    sandbox for the whole process, from any thread.
    """

    def __init__(
        self,
        *,
        python: str | None = None,
        unsafe: bool = False,
        limits: Limits | None = None,
        num_workers: int | None = None,
    ) -> None:
        """Try the sandbox out, which takes a second; nothing is run in one that does not hold.

        Args:
            python: interpreter of the programs; None = the system's. Packages it has are there for the programs.
            unsafe: run without bubblewrap, with resource limits alone.
            limits: of every program.
            num_workers: programs at a time; None = the cores that this process may use.

        Raises:
            SandboxError: this machine has no working sandbox; the text names what failed and the remedy.
        """
        self.limits = limits or Limits()
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._python = find_interpreter(python)
        self._launch = run_unsafely if unsafe else run_in_bubblewrap
        self._free = threading.BoundedSemaphore(self.num_workers)
        self.slowness = 1.0
        if unsafe:
            logger.warning(
                "--unsafe-code-execution: programs of the model run WITHOUT a sandbox; they can read your files and "
                "use the network. Install bubblewrap instead."
            )
        else:
            check_isolation(self.run)
        self.slowness = measure_slowness(self.run)
        logger.info("code sandbox: %s, time limits times %.1f", self._python.executable, self.slowness)

    def run(self, job: Job) -> Finished:
        """Run one job; waits while all workers are busy."""
        slowed = replace(job, timeout_s=job.timeout_s * self.slowness)
        with self._free:
            return self._launch(slowed, self.limits, self._python)

    def run_all(self, jobs: Sequence[Job], *, stop: Callable[[Finished], bool] | None = None) -> Iterator[Finished]:
        """Run jobs at the same time and yield their results in order, up to the first that `stop` is true for."""
        with ThreadPoolExecutor(min(self.num_workers, len(jobs)), thread_name_prefix="sandbox") as executor:
            futures = [executor.submit(self.run, job) for job in jobs]
            try:
                for future in futures:
                    finished = future.result()
                    yield finished
                    if stop is not None and stop(finished):
                        return
            finally:
                for future in futures:
                    future.cancel()
