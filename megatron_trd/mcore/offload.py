"""Host memory as the waiting room of the device: weights between their forwards, hidden states before their loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_host(values: Tensor) -> Tensor:
    """Copy to host memory; from a CUDA device to pinned memory, in the order of its current stream."""
    host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=values.is_cuda)


class OffloadedWeights:
    """Frozen parameters that live in host memory and visit the device for the length of a `with`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        """Move the parameters to the host now.

        Args:
            parameters: none of them may need a gradient.
            device: where they are wanted.
        """
        self._device = device
        self._hosts = [(parameter, to_host(parameter.data)) for parameter in parameters]
        self._leave()

    @property
    def num_bytes(self) -> int:
        """Size of what is off the device between visits."""
        return sum(host.nbytes for _, host in self._hosts)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Bring the weights, and let go of the copies at the end."""
        for parameter, host in self._hosts:
            parameter.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in self._hosts:
            parameter.data = host


class BoundedRows:
    """Hidden states of a step's micro-batches: on the device up to a budget, past it in host memory."""

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self._budget, self._device = budget_bytes, device
        self.device_bytes = 0
        self.host_bytes = 0

    def keep(self, rows: Tensor) -> Tensor:
        """Take a micro-batch's hidden states; return them as they wait, here or there."""
        if self.device_bytes + rows.nbytes <= self._budget:
            self.device_bytes += rows.nbytes
            return rows
        self.host_bytes += rows.nbytes
        return to_host(rows)

    def hand_out(self, kept: list[Tensor]) -> Iterator[Tensor]:
        """Yield what was kept, in order, on the device; each is let go when the next is asked for."""
        kept.reverse()
        while kept:
            yield kept.pop().to(self._device, non_blocking=True)
