"""Tensors in buckets: a stream of any length through one buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some tensors, their bytes one after the other without gaps. Valid until the next one is asked for."""

    names: Sequence[str]
    dtypes: Sequence[torch.dtype]
    shapes: Sequence[tuple[int, ...]]
    flat: Tensor
    """[bytes] uint8, on the device of the tensors; each begins where its dtype may."""

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where each tensor begins and ends in `flat`, in bytes."""
        start = 0
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            end = start + torch.Size(shape).numel() * dtype.itemsize
            yield start, end
            start = end


def buckets(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Gather tensors into buckets, in order, each copied as it comes: memory for one bucket and one tensor.

    Args:
        max_bytes: a bucket is closed before it would grow beyond this; a larger tensor is a bucket of its own.
    """
    buffer: Tensor | None = None
    pending: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    used = 0

    def filled(flat: Tensor) -> Bucket:
        names, dtypes, shapes = zip(*pending, strict=True)
        pending.clear()
        return Bucket(names=names, dtypes=dtypes, shapes=shapes, flat=flat)

    for name, tensor in weights:
        size, entry = tensor.nbytes, (name, tensor.dtype, tuple(tensor.shape))
        is_misaligned = used % tensor.dtype.itemsize != 0  # it could not be viewed in place as what it is
        if pending and (used + size > max_bytes or is_misaligned):
            assert buffer is not None
            yield filled(buffer[:used])
            used = 0
        bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8)
        if size > max_bytes:
            pending.append(entry)
            yield filled(bytes_)
            continue
        if buffer is None:
            buffer = torch.empty(max_bytes, dtype=torch.uint8, device=tensor.device)
        buffer[used : used + size].copy_(bytes_)
        pending.append(entry)
        used += size
    if pending:
        assert buffer is not None
        yield filled(buffer[:used])
