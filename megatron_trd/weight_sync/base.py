"""How new weights reach servers: what a transport is, and what it asks of the servers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class ServerError(RuntimeError):
    """A server refused a request, failed at it or did not answer; the message names its URL."""


class WeightServer(Protocol):
    """One server that can take new weights. Every call raises ServerError if it fails or is late."""

    url: str
    tp_size: int
    """Ranks that share its model; each takes its own copy of a payload, and is a member of an update group."""
    weight_version: str | None
    """What it held when it was last asked."""

    async def pause(self, mode: str, timeout_s: float) -> None:
        """Stop decoding: `retract` keeps the requests and drops their cache, `abort` ends them."""
        ...

    async def flush(self, timeout_s: float) -> None:
        """Drop all cached keys and values."""
        ...

    async def continue_(self, timeout_s: float) -> None:
        """Decode again."""
        ...

    async def begin_weight_update(self, timeout_s: float) -> None:
        """Open a weight-update session; nothing where the server's version knows none."""
        ...

    async def end_weight_update(self, timeout_s: float) -> None:
        """Close it."""
        ...

    async def update_weights_from_disk(self, path: str, version: str, timeout_s: float) -> None:
        """Load a Hugging Face directory and name the weights `version`. Outside a session."""
        ...

    async def update_weights_from_tensor(self, payloads: Sequence[str], timeout_s: float) -> None:
        """Load one flattened bucket, a base64 payload for each of its ranks. Inside a session."""
        ...

    async def join_update_group(
        self, name: str, backend: str, address: str, port: int, first_rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Join a process group that the trainer is rank 0 of, as ranks from `first_rank` on."""
        ...

    async def leave_update_group(self, name: str, timeout_s: float) -> None:
        """Leave it."""
        ...

    async def update_weights_from_distributed(
        self, group: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], timeout_s: float
    ) -> None:
        """Receive one flattened bucket that the trainer broadcasts in `group`. Inside a session."""
        ...

    async def load_adapter(
        self, name: str, config: Mapping[str, Any], payloads: Sequence[str], timeout_s: float
    ) -> None:
        """Hold another LoRA adapter, given as PEFT's configuration and tensors."""
        ...

    async def unload_adapter(self, name: str, timeout_s: float) -> None:
        """Drop a LoRA adapter."""
        ...

    async def name_weights(self, version: str, timeout_s: float) -> None:
        """Call the weights it holds `version` from now on."""
        ...

    async def read_weight_version(self, timeout_s: float) -> str:
        """Return the version the server says it holds."""
        ...

    async def weight_checksums(self, timeout_s: float) -> Mapping[str, str]:
        """Return a checksum of each parameter, under the server's own (fused) names."""
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

    def end_update(self, version: str, failures: Mapping[str, str], adapter: str | None = None) -> None:
        """From now on `version` alone is right; servers in `failures` (by URL) are out of use until they hold it.

        Args:
            adapter: LoRA adapter that requests must name from now on; None = the model's own weights.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one publication did."""

    version: str
    num_bytes: int
    seconds: float
    """Wall-clock of the whole publication."""
    paused_seconds: float
    """The part of it in which the servers did not decode."""
    failures: Mapping[str, str]
    """URL -> reason of every server that does not hold the version now."""

    def metrics(self) -> dict[str, float]:
        """Return the report as metric tags."""
        return {
            "weights/sync_s": self.seconds,
            "weights/paused_s": self.paused_seconds,
            "weights/bytes": float(self.num_bytes),
            "server/stale": float(len(self.failures)),
        }


class WeightSync(Protocol):
    """A transport from the trainer to servers."""

    async def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: Collection[str] | None = None
    ) -> SyncReport:
        """Bring `weights` (Hugging Face names, each tensor whole) to every server, or to those whose URL is in `only`.

        Exhausts `weights` whatever happens, on the caller's thread, because making them is collective.

        Raises:
            ServerError: no server holds `version` now.
        """
        ...

    async def close(self) -> None:
        """Let go of what is held between two publications."""
        ...
