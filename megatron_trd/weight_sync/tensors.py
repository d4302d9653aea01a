"""Weights through the servers' HTTP door: the data itself from a CPU, CUDA-IPC handles from a GPU."""

from __future__ import annotations

import socket
from contextlib import closing
from urllib.parse import urlsplit

import torch

from megatron_trd.weight_sync.base import ServerError, WeightServer
from megatron_trd.weight_sync.buckets import Bucket
from megatron_trd.weight_sync.payload import bucket_payload
from megatron_trd.weight_sync.session import WeightUpdate
from megatron_trd.weight_sync.streaming import StreamingWeightSync

_REMEDY = "use --weight-sync distributed"


class TensorWeightSync(StreamingWeightSync):
    """Posts each bucket to every server. From a GPU: to servers of this machine that see that GPU, one GPU each."""

    async def send(self, bucket: Bucket, update: WeightUpdate) -> None:
        """See `StreamingWeightSync.send`."""
        on_gpu = bucket.flat.is_cuda
        if on_gpu:
            torch.cuda.synchronize(bucket.flat.device)  # another process is going to read it
        text = None if on_gpu else bucket_payload(bucket)

        async def post(server: WeightServer) -> None:
            if text is None:
                _require_same_machine(server)
            # A handle may be opened once: each server gets its own.
            payload = text if text is not None else bucket_payload(bucket)
            await server.update_weights_from_tensor([payload] * server.tp_size, update.share_s())

        await update.each(post)
        if on_gpu:
            torch.cuda.ipc_collect()

    async def close(self) -> None:
        """Nothing is held."""


def _require_same_machine(server: WeightServer) -> None:
    if server.tp_size > 1:
        raise ServerError(
            f"--weight-sync tensor: {server.url} has tensor-parallel size {server.tp_size}; a GPU's tensors reach "
            f"servers of one GPU only; {_REMEDY}"
        )
    if not is_local(urlsplit(server.url).hostname or ""):
        raise ServerError(
            f"--weight-sync tensor: {server.url} is on another machine, which cannot open CUDA-IPC handles; {_REMEDY}"
        )


def is_local(host: str) -> bool:
    """Whether a host name is an address of this machine: one can bind to it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
