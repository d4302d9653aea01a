"""How often and how long one request is tried."""

from __future__ import annotations

import asyncio
import time
from random import Random

from megatron_trd.weight_sync.base import ServerError

MAX_BACKOFF_S = 10.0


class GaveUpError(ServerError):
    """A request's tries or its time are used up."""


class Tries:
    """What is left of one request's tries and time.

    A failure costs a try. Back-pressure and progress do not: a server that says its queue is full is asked again, and
    a response that broke off after some tokens goes on, until the time is up. All of it together has as much time as
    all tries would: (retries + 1) * timeout_s. Pauses between tries grow and are random (full jitter), so that
    requests that failed together do not come back together.
    """

    def __init__(self, retries: int, timeout_s: float, first_backoff_s: float, random: Random) -> None:
        """Start the clock.

        Args:
            timeout_s: deadline of each try.
            first_backoff_s: longest pause after the first failure; doubles with each.
        """
        self._retries, self._timeout_s = retries, timeout_s
        self._first_backoff_s, self._random = first_backoff_s, random
        self._total_s = (retries + 1) * timeout_s
        self._end = time.monotonic() + self._total_s
        self._failures: list[str] = []
        self._num_busy = 0
        self._busy = ""
        self.was_hedged = False

    @property
    def num_failures(self) -> int:
        """Tries that failed."""
        return len(self._failures)

    def timeout_s(self) -> float:
        """Return the deadline of the next try. Raises GaveUpError if the time is up."""
        left = self._end - time.monotonic()
        if left <= 0:
            seen = " | ".join([*self._failures, *filter(None, [self._busy])]) or "it went on from server to server"
            raise GaveUpError(
                f"not answered within {self._total_s:g} s (--request-timeout-s {self._timeout_s:g}, "
                f"--request-retries {self._retries}): {seen}"
            )
        return min(self._timeout_s, left)

    async def failed(self, reason: str) -> None:
        """Count a failed try and wait for the next one. Raises GaveUpError if it was the last."""
        self._failures.append(reason)
        if self.num_failures > self._retries:
            raise GaveUpError(
                f"failed {self.num_failures} times (--request-retries {self._retries}): {' | '.join(self._failures)}"
            )
        await self._pause(self.num_failures)

    async def busy(self, reason: str) -> None:
        """Wait because a server has no room."""
        self._num_busy += 1
        self._busy = reason
        await self._pause(self._num_busy)

    async def _pause(self, times: int) -> None:
        longest = min(self._first_backoff_s * 2.0 ** min(times - 1, 16), MAX_BACKOFF_S, self.timeout_s())
        await asyncio.sleep(self._random.uniform(0.0, longest))
