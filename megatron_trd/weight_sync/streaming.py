"""What the transports that send tensors have in common: checks, buckets, and the session around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

from torch import Tensor

from megatron_trd.weight_sync.base import SyncReport, WeightServer, WeightServers
from megatron_trd.weight_sync.buckets import Bucket, buckets
from megatron_trd.weight_sync.names import checked, expected_shapes, keeps_own_head, with_head
from megatron_trd.weight_sync.session import WeightUpdate, exhausting


class StreamingWeightSync(ABC):
    """Sends an export bucket by bucket, as it is made."""

    def __init__(
        self,
        checkpoint: str | Path,
        servers: WeightServers,
        *,
        bucket_bytes: int,
        timeout_s: float = 600.0,
        check_equal: bool = False,
    ) -> None:
        """Read what an export must look like; nothing is sent.

        Args:
            checkpoint: Hugging Face directory whose tensors the export has, by name and shape.
            bucket_bytes: size of a bucket; a larger tensor is one of its own.
            timeout_s: the longest time that servers may be at rest.
            check_equal: compare the servers' checksums after each publication.
        """
        self.servers, self.bucket_bytes = servers, bucket_bytes
        self.timeout_s, self.check_equal = timeout_s, check_equal
        self._shapes = expected_shapes(checkpoint)
        self._own_heads: dict[str, bool] = {}
        """Servers that were checked, by URL."""

    async def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: Collection[str] | None = None
    ) -> SyncReport:
        """Send all tensors to all servers at once; see `WeightSync.publish`.

        Raises:
            ValueError: the export does not fit the checkpoint; what did not fit was not sent.
        """
        update = WeightUpdate(self.servers, version, timeout_s=self.timeout_s, check_equal=self.check_equal, only=only)
        with exhausting(weights) as export:
            async with update:
                await update.each(lambda server: self._check(server, update.share_s()))
                stream = checked(export, self._shapes)
                if any(self._own_heads[server.url] for server in update.taking_part):
                    stream = with_head(stream)
                for bucket in buckets(stream, self.bucket_bytes):
                    if update.taking_part:
                        await self.send(bucket, update)
                        update.num_bytes += bucket.flat.nbytes
        for url in update.failures:  # another server may stand there next time
            self._own_heads.pop(url, None)
        return update.report()

    async def _check(self, server: WeightServer, timeout_s: float) -> None:
        if server.url not in self._own_heads:
            sums = await server.weight_checksums(timeout_s)
            held = {name.partition(":")[2] for name in sums}
            self._own_heads[server.url] = keeps_own_head(server.url, held, self._shapes)

    @abstractmethod
    async def send(self, bucket: Bucket, update: WeightUpdate) -> None:
        """Bring one bucket to every server that takes part, and drop those that fail."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of what is held between two publications."""
