"""Seconds of a step's parts, on the clock of the device that works on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """`with watch("optimizer"): ...`. CUDA's own events: nothing waits for the device until `lap`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._parts: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Charge the body to `part`."""
        start = self._now()
        yield
        self._parts.append((part, start, self._now()))

    def lap(self) -> dict[str, float]:
        """Wait for the device, return the seconds of each part since the last call, and start anew."""
        self.wait()
        seconds: dict[str, float] = {}
        for part, start, end in self._parts:
            took = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[part] = seconds.get(part, 0.0) + took
        self._parts = []
        return seconds

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
