"""Rollouts ahead of training: a process of its own samples the next batches while the trainer trains.

With --rollout-staleness S, the batch of iteration j begins as soon as the servers hold version j - S of the weights
(`staleness.py` says what that means), so up to S batches are under way while another trains. New weights reach the
servers in the middle of requests: these are set back and go on with the new weights, and one completion carries
several versions. What is older than S in the end is sampled again. Batches live in this process alone: after a resume
they are rolled out anew from the cursor.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from megatron_trd.config.schema import Config
from megatron_trd.rollout import ahead_worker
from megatron_trd.rollout.refine import RolloutBatch
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import WeightServer, WeightServers

CALL_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 15.0


class RolloutProcessError(RuntimeError):
    """The process that rolls out died, or failed at what it was asked."""


class RolloutProcess:
    """The process, as its parent sees it: each call sends a name and arguments, and waits for one answer."""

    def __init__(self, config: Config, task: Task) -> None:
        """Start the process; `wait_ready` waits for it.

        Raises:
            ValueError: the task cannot be sent to another process.
        """
        self._batch_timeout_s = 60.0 * config.parallel.rollout_timeout_minutes
        self._ready_timeout_s = CALL_TIMEOUT_S + config.rollout.server_timeout_s
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, config, _pickled(task, config.rollout.rollout_staleness))
        self._process = context.Process(target=ahead_worker.main, args=arguments, name="rollouts")
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Id of the process."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until it reached all servers. Raises ValueError if it did not, RolloutProcessError if it died."""
        self._receive(self._ready_timeout_s)

    def batch(self, iteration: int, cursor: int) -> RolloutBatch:
        """Return the batch of an iteration, which starts at problem `cursor`; the next ones go on.

        Raises:
            ValueError: a flag does not allow what a problem needs.
            RolloutProcessError: the process died, failed or is late.
        """
        return self._call("batch", iteration, cursor, timeout_s=self._batch_timeout_s)

    def begin_update(self, version: str) -> None:
        """Tell its fleet what `WeightServers.begin_update` says. Raises RolloutProcessError."""
        self._call("begin_update", version)

    def end_update(self, version: str, failures: Mapping[str, str], adapter: str | None) -> None:
        """Tell its fleet what `WeightServers.end_update` says; the next batch begins. Raises RolloutProcessError."""
        self._call("end_update", version, dict(failures), adapter)

    def counters(self) -> dict[str, float]:
        """Return what happened to its requests to the student's servers. Raises RolloutProcessError."""
        return self._call("counters")

    def close(self) -> None:
        """End the process: it aborts its requests, and is killed if that takes too long."""
        self._connection.close()
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, name: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            self._connection.send((name, arguments))
        except OSError as error:
            raise self._died() from error
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        ready = wait([self._connection, self._process.sentinel], timeout_s)
        if not ready:
            raise RolloutProcessError(
                f"the rollout process (pid {self.pid}) gave no answer within {timeout_s:g} s; look for hanging "
                "servers, or raise --rollout-timeout-minutes"
            )
        if self._connection not in ready:
            raise self._died()
        try:
            result, kind, message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind is not None:
            raise (ValueError if kind == "ValueError" else RolloutProcessError)(message)
        return result

    def _died(self) -> RolloutProcessError:
        self._process.join(CLOSE_TIMEOUT_S)
        return RolloutProcessError(
            f"the rollout process (pid {self.pid}) died with exit code {self._process.exitcode}; what it said last is "
            "above. Start the run again: it goes on from its newest checkpoint"
        )


class ObservedServers:
    """Servers whose updates the rollout process hears of too, at the moment they happen."""

    def __init__(self, servers: WeightServers, process: RolloutProcess) -> None:
        """Remember both."""
        self._servers, self._process = servers, process

    @property
    def servers(self) -> Sequence[WeightServer]:
        """See `WeightServers.servers`."""
        return self._servers.servers

    def begin_update(self, version: str) -> None:
        """See `WeightServers.begin_update`. Raises RolloutProcessError."""
        self._process.begin_update(version)
        self._servers.begin_update(version)

    def end_update(self, version: str, failures: Mapping[str, str], adapter: str | None = None) -> None:
        """See `WeightServers.end_update`. Raises RolloutProcessError."""
        self._servers.end_update(version, failures, adapter)
        self._process.end_update(version, failures, adapter)


def _pickled(task: Task, staleness: int) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--rollout-staleness {staleness}: task {task.name!r} cannot be sent to the process that rolls out "
            f"({error}); define its class at the top of a module and open files and connections at their first use, or "
            "use --rollout-staleness 0"
        ) from error
