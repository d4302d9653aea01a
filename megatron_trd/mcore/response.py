"""From hidden states of a packed stream to the R rows that predict response tokens.

Under sequence and context parallelism a rank holds a part of the stream, and the part says nothing about how many
response tokens fall into it; the student's and the teacher's stream put the same token on different ranks. The rows
are therefore dealt out anew: R is padded to a multiple of the ranks that share a stream and rank i of them gets rows
[i n, (i + 1) n), whatever stream they come from. One all-to-all moves just those rows; the backward pass sends the
gradients back the same way. The [T, hidden] stream is never gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore import context_parallel
from megatron_trd.mcore.groups import Groups


def response_rows(hidden: Tensor, stream: PackedStream, groups: Groups, *, sequence_parallel: bool) -> Tensor:
    """Select the hidden states that predict response tokens. Collective over the ranks that share the stream.

    Args:
        hidden: this rank's part of the stream's hidden states: [T / cp, hidden], or [T / cp / tp, hidden] under
            sequence parallelism.
        stream: the whole stream, identical on all ranks that share it.

    Returns:
        [ceil(R / cp), hidden], or [ceil(R / cp / tp), hidden] under sequence parallelism: this rank's of the padded
        rows (padding repeats some row and must get zero weight in the loss).
    """
    group, size = _sharers(groups, sequence_parallel)
    if size == 1:
        return hidden.index_select(0, stream.response_positions)
    positions = stream.response_positions
    if groups.cp_size > 1:
        positions = context_parallel.places(stream.cu_seqlens, groups.cp_size)[positions]
    return _DealRows.apply(hidden, _padded(positions, size), group)


def response_values(values: Tensor, groups: Groups, *, sequence_parallel: bool) -> Tensor:
    """Cut [R] values of response tokens as `response_rows` deals the rows: what the loss of this rank wants.

    Identical on all tensor-parallel ranks: [ceil(R / cp)], padded with zeros to a multiple of them under sequence
    parallelism.
    """
    padded = _padded(values, _sharers(groups, sequence_parallel)[1])
    return padded.tensor_split(groups.cp_size)[groups.cp_rank]


def gather_response_values(part: Tensor, num_tokens: int, groups: Groups) -> Tensor:
    """Undo `response_values`: [R] on every rank. Collective over the context-parallel group."""
    parts = [torch.empty_like(part) for _ in range(groups.cp_size)]
    dist.all_gather(parts, part.contiguous(), group=groups.cp)
    return torch.cat(parts)[:num_tokens]


def _sharers(groups: Groups, sequence_parallel: bool) -> tuple[dist.ProcessGroup, int]:
    if sequence_parallel:
        return groups.tp_cp, groups.tp_size * groups.cp_size
    return groups.cp, groups.cp_size


def _padded(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % multiple))


class _DealRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Tensor, group: dist.ProcessGroup) -> Tensor:
        size, rank = group.size(), group.rank()
        per_owner, per_taker = hidden.size(0), places.numel() // size
        owner = places // per_owner  # [R] rank that holds the row
        taker = torch.arange(places.numel(), device=places.device) // max(per_taker, 1)
        outgoing = (owner == rank).nonzero().flatten()  # in order of the taker
        incoming = owner[taker == rank]
        order = torch.argsort(incoming, stable=True)  # arrival order -> place among this rank's rows
        ctx.local_rows = places[outgoing] - rank * per_owner
        ctx.send_counts = torch.bincount(taker[outgoing], minlength=size).tolist()
        ctx.receive_counts = torch.bincount(incoming, minlength=size).tolist()
        ctx.order, ctx.shape, ctx.group = order, hidden.shape, group
        arrived = _exchange(hidden[ctx.local_rows], ctx.receive_counts, ctx.send_counts, group)
        rows = torch.empty_like(arrived)
        rows[order] = arrived
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        returned = _exchange(grad[ctx.order], ctx.send_counts, ctx.receive_counts, ctx.group)
        grad_hidden = grad.new_zeros(ctx.shape)
        return grad_hidden.index_add_(0, ctx.local_rows, returned), None, None


def _exchange(rows: Tensor, receive_counts: list[int], send_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive_counts), rows.size(1)))
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
    return received
