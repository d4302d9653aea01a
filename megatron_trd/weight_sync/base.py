"""How new weights reach servers: what a transport is, and what it asks of the servers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class ServerError(RuntimeError):
    """A server refused a request, failed at it or did not answer; the message names its URL."""


class WeightServer(Protocol):
    """One server that can take new weights. Every call raises ServerError if it fails or is late."""

    url: str

    async def pause(self, mode: str, timeout_s: float) -> None:
        """Stop decoding; mode `retract` keeps the requests and drops their cache."""
        ...

    async def flush(self, timeout_s: float) -> None:
        """Drop all cached keys and values."""
        ...

    async def update_weights_from_disk(self, path: str, version: str, timeout_s: float) -> None:
        """Load a Hugging Face directory and name the weights `version`."""
        ...

    async def continue_(self, timeout_s: float) -> None:
        """Decode again."""
        ...

    async def read_weight_version(self, timeout_s: float) -> str:
        """Return the version the server says it holds."""
        ...


class WeightServers(Protocol):
    """The servers that hold one model."""

    @property
    def servers(self) -> Sequence[WeightServer]:
        """All of them, also those that are out of use at the moment."""
        ...

    def begin_update(self, version: str) -> None:
        """Announce that `version` is on its way: it and the old one are both right until `end_update`."""
        ...

    def end_update(self, version: str, failures: Mapping[str, str]) -> None:
        """From now on `version` alone is right; servers in `failures` (by URL) are out of use until they hold it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one publication did."""

    version: str
    num_bytes: int
    seconds: float
    """Wall-clock of the whole publication."""
    write_seconds: float
    """The part of it spent exporting and writing the weights."""
    failures: Mapping[str, str]
    """URL -> reason of every server that does not hold the version now."""

    def metrics(self) -> dict[str, float]:
        """Return the report as metric tags."""
        return {
            "weights/sync_s": self.seconds,
            "weights/write_s": self.write_seconds,
            "weights/bytes": float(self.num_bytes),
            "server/stale": float(len(self.failures)),
        }


class WeightSync(Protocol):
    """A transport from the trainer to servers."""

    async def publish(self, weights: Iterable[tuple[str, Tensor]], version: str) -> SyncReport:
        """Bring `weights` (Hugging Face names, each tensor whole) to every server under the name `version`.

        Exhausts `weights` first, on the caller's thread, because making them is collective. Raises ServerError if
        no server took them.
        """
        ...
