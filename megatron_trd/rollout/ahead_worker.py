"""The inside of the rollout process; `ahead.py` is its parent's side.

It ends when its parent does: the operating system then closes the pipe between them. It opens neither process groups
nor a GPU.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

from megatron_trd.config.schema import Config
from megatron_trd.log import configure, get_logger
from megatron_trd.rollout.online import OnlineRollouts, fleet_counters, open_student
from megatron_trd.rollout.refine import RolloutBatch
from megatron_trd.rollout.staleness import iteration_of, weight_version
from megatron_trd.rollout.vocabulary import load_tokenizer
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)
GOODBYE_S = 10.0
"""From the end of the parent to the end of this process at the latest."""


def main(connection: Connection, config: Config, pickled_task: bytes) -> None:
    """Serve the parent until it closes the connection or is gone."""
    configure(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    asyncio.run(_run(connection, config, pickled_task))


async def _run(connection: Connection, config: Config, pickled_task: bytes) -> None:
    try:
        task = pickle.loads(pickled_task)
    except (AttributeError, ImportError, TypeError, ValueError, pickle.UnpicklingError) as error:
        refusal = f"--task {config.data.task}: the rollout process cannot make it ({error}); define its class at the "
        refusal += "top of a module that can be imported, or use --rollout-staleness 0"
        connection.send((None, "ValueError", refusal))
        return
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    async with AsyncExitStack() as stack:
        try:
            student = await open_student(config, tokenizer, stack)
            rollouts = await OnlineRollouts.open(config, task, tokenizer, student, stack)
        except ServerError as error:
            connection.send((None, "ValueError", str(error)))
            return
        connection.send((None, None, ""))
        await AheadWorker(rollouts).serve(connection)


class AheadWorker:
    """The batches under way, and the calls that the parent makes by name."""

    def __init__(self, rollouts: OnlineRollouts) -> None:
        """Remember the servers; nothing begins before the first call of `batch`."""
        self._rollouts = rollouts
        self._batches: dict[int, asyncio.Task[RolloutBatch]] = {}
        self._next: int | None = None
        """The first iteration whose batch has not begun."""
        self._first_problem = 0
        """Where iteration 0 would start in the stream of problems."""

    async def batch(self, iteration: int, cursor: int) -> RolloutBatch:
        """Return the batch of an iteration; the ones after it have begun."""
        if self._next is None:
            self._next = iteration
            self._first_problem = cursor - iteration * self._rollouts.config.data.rollout_batch_size
        self._begin(iteration)
        return await self._batches.pop(iteration)

    async def begin_update(self, version: str) -> None:
        """See `WeightServers.begin_update`."""
        self._rollouts.student.begin_update(version)

    async def end_update(self, version: str, failures: Mapping[str, str], adapter: str | None) -> None:
        """See `WeightServers.end_update`; the batch that waited for this version begins."""
        student, iteration = self._rollouts.student, iteration_of(version)
        assert iteration is not None, f"no trainer names weights {version!r}"
        student.end_update(version, failures, adapter)
        oldest = max(0, iteration - self._rollouts.config.rollout.rollout_staleness)
        student.accept([weight_version(number) for number in range(oldest, iteration)])
        if self._next is not None:
            self._begin(iteration)

    async def counters(self) -> dict[str, float]:
        """Return what happened to the requests to the student's servers, as metric tags."""
        return fleet_counters(self._rollouts.student)

    def _begin(self, published: int) -> None:
        """Begin every batch that the weights after `published` iterations are new enough for."""
        assert self._next is not None
        config = self._rollouts.config
        end = min(published + config.rollout.rollout_staleness + 1, config.data.num_iterations)
        for iteration in range(self._next, end):
            cursor = self._first_problem + iteration * config.data.rollout_batch_size
            logger.info("rollout of iteration %d begins with weights %d", iteration + 1, published)
            self._batches[iteration] = asyncio.create_task(self._rollouts.batch(iteration, cursor))
        self._next = max(self._next, end)

    async def serve(self, connection: Connection) -> None:
        """Answer calls in their order until the parent hangs up."""
        loop = asyncio.get_running_loop()
        calls: asyncio.Queue[tuple[str, tuple[Any, ...]]] = asyncio.Queue()
        serving = asyncio.create_task(self._answer(connection, calls))

        def receive() -> None:
            try:
                while True:
                    loop.call_soon_threadsafe(calls.put_nowait, connection.recv())
            except (EOFError, OSError):
                last_word = threading.Timer(GOODBYE_S, os._exit, (1,))
                last_word.daemon = True
                last_word.start()
                loop.call_soon_threadsafe(serving.cancel)

        threading.Thread(target=receive, name="calls", daemon=True).start()
        await asyncio.wait([serving])
        for batch in self._batches.values():
            batch.cancel()
        await asyncio.gather(*self._batches.values(), return_exceptions=True)
        if not serving.cancelled():
            serving.result()

    async def _answer(self, connection: Connection, calls: asyncio.Queue[tuple[str, tuple[Any, ...]]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            name, arguments = await calls.get()
            call = asyncio.ensure_future(getattr(self, name)(*arguments))
            await asyncio.wait([call])
            answer: tuple[Any, str | None, str]
            if error := call.exception():
                kind = "ValueError" if isinstance(error, ValueError) else "failure"
                logger.error("%s%r failed", name, arguments, exc_info=error)
                answer = (None, kind, str(error) if kind == "ValueError" else f"{type(error).__name__}: {error}")
            else:
                answer = (call.result(), None, "")
            with suppress(OSError):  # the parent is gone, and the thread that listens to it knows
                await loop.run_in_executor(None, connection.send, answer)
