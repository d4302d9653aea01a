"""Weights broadcast from the trainer to all servers at once, in a process group of theirs (NCCL; gloo on a CPU)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from megatron_trd.weight_sync.base import WeightServers
from megatron_trd.weight_sync.buckets import Bucket
from megatron_trd.weight_sync.session import WeightUpdate
from megatron_trd.weight_sync.streaming import StreamingWeightSync
from megatron_trd.weight_sync.update_group import UpdateGroup


class DistributedWeightSync(StreamingWeightSync):
    """The group is made at the first publication and kept; another one when servers come or go, or one failed."""

    def __init__(
        self,
        checkpoint: str | Path,
        servers: WeightServers,
        *,
        bucket_bytes: int,
        address: str | None = None,
        timeout_s: float = 600.0,
        check_equal: bool = False,
    ) -> None:
        """Like `StreamingWeightSync`.

        Args:
            address: where the servers reach this process; None = see `address_towards`.
        """
        super().__init__(checkpoint, servers, bucket_bytes=bucket_bytes, timeout_s=timeout_s, check_equal=check_equal)
        self.address = address
        self.group: UpdateGroup | None = None

    async def send(self, bucket: Bucket, update: WeightUpdate) -> None:
        """See `StreamingWeightSync.send`."""
        backend = "nccl" if bucket.flat.is_cuda else "gloo"
        try:
            if self.group is None or not self.group.serves(update.taking_part, backend):
                await self.close()
                address = self.address or address_towards([server.url for server in update.taking_part])
                self.group = UpdateGroup(update.taking_part, address, backend)
                await self.group.join(update)
            if update.taking_part:
                await self.group.broadcast(bucket, update)
        except BaseException:  # cancelled: no server shall wait for the rest
            await self.close()
            raise

    async def close(self) -> None:
        """Leave the group, on all sides as far as they answer."""
        group, self.group = self.group, None
        if group is not None:
            await group.leave()


def address_towards(urls: Sequence[str]) -> str:
    """Return the address at which servers reach this machine: loopback if all are there, else that of its interface
    towards the first that is not.

    Raises:
        ValueError: a host name has no address.
    """
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
            )[0]
            if ipaddress.ip_address(address[0]).is_loopback:
                continue
            with closing(socket.socket(family, kind, protocol)) as probe:
                probe.connect(address)  # of a datagram socket: chooses the interface, sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(
                f"--student-urls {url}: no way there from this machine ({error}); give --weight-sync-address"
            ) from error
    return "127.0.0.1"
