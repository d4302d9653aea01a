"""From hidden states of a packed stream to the R rows that predict response tokens.

Under sequence parallelism a rank holds a slice of the stream, and the slice says nothing about how many response
tokens fall into it. The rows are therefore dealt out anew: R is padded to a multiple of the tensor-parallel size
and rank i gets rows [i n, (i + 1) n), whatever stream they come from. One all-to-all moves just those rows; the
backward pass sends the gradients back the same way. The [T, hidden] stream is never gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.mcore.groups import Groups


def response_rows(hidden: Tensor, positions: Tensor, groups: Groups, *, sequence_parallel: bool) -> Tensor:
    """Select the hidden states that predict response tokens.

    Args:
        hidden: [T, hidden], or this rank's [T / tp, hidden] under sequence parallelism.
        positions: [R] positions in the whole stream, identical on all tensor-parallel ranks.

    Returns:
        [R, hidden] on every rank; under sequence parallelism this rank's [ceil(R / tp), hidden] of the padded
        rows (padding repeats position 0 and must get zero weight in the loss).
    """
    if not sequence_parallel:
        return hidden.index_select(0, positions)
    return _DealRows.apply(hidden, pad_rows(positions, groups.tp_size), groups)


def pad_rows(values: Tensor, tp_size: int) -> Tensor:
    """Pad [R] with zeros to a multiple of `tp_size`: the length that `response_rows` deals out."""
    return torch.nn.functional.pad(values, (0, -values.numel() % tp_size))


class _DealRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor, groups: Groups) -> Tensor:
        per_owner, per_taker = hidden.size(0), positions.numel() // groups.tp_size
        owner = positions // per_owner  # [R] rank that holds the row
        taker = torch.arange(positions.numel(), device=positions.device) // max(per_taker, 1)
        outgoing = (owner == groups.tp_rank).nonzero().flatten()  # in order of the taker
        incoming = owner[taker == groups.tp_rank]
        order = torch.argsort(incoming, stable=True)  # arrival order -> place among this rank's rows
        ctx.local_rows = positions[outgoing] - groups.tp_rank * per_owner
        ctx.send_counts = torch.bincount(taker[outgoing], minlength=groups.tp_size).tolist()
        ctx.receive_counts = torch.bincount(incoming, minlength=groups.tp_size).tolist()
        ctx.order, ctx.shape, ctx.group = order, hidden.shape, groups.tp
        arrived = _exchange(hidden[ctx.local_rows], ctx.receive_counts, ctx.send_counts, groups.tp)
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
