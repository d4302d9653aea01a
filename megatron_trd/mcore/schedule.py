"""Micro-batches through the pipeline: Megatron's schedules with what all of our passes have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore.gpt import GPTChunks, forward_stream
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.response import response_rows

T = TypeVar("T")


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[T],
    forward: Callable[[torch.nn.Module, T], tuple[Tensor, Callable]],
    groups: Groups,
    *,
    forward_only: bool,
    collect_outputs: bool = False,
) -> list[Any]:
    """Carry every micro-batch through all stages, and back. Collective over all ranks that share the micro-batches.

    Args:
        chunks: this rank's; with more than one the schedule interleaves, and the number of micro-batches must be a
            multiple of the pipeline's stages.
        forward: gives a chunk's hidden states [T, 1, hidden] and the function that the last chunk's are passed to.
        collect_outputs: that function is not a loss.

    Returns:
        What the function reported for each micro-batch, on the last stage; elsewhere nothing.
    """
    virtual_stages = len(chunks) if len(chunks) > 1 else None
    schedule = get_forward_backward_func(pp_size=groups.pp_size, vp_size=virtual_stages)
    return schedule(
        forward_step_func=lambda batches, chunk: forward(chunk, next(batches)),
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=1,  # lengths vary: the stages tell each other
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_outputs,
    )


@torch.no_grad()
def rows_without_gradients(
    model: GPTChunks,
    streams: Sequence[PackedStream],
    groups: Groups,
    keep: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> list[Tensor]:
    """Return each stream's hidden states as `response_rows` deals them, on the last stage; elsewhere nothing.

    Collective over all ranks that share the streams.

    Args:
        keep: what becomes of each until all are there.
    """
    sequence_parallel = model.config.sequence_parallel

    def forward(chunk: torch.nn.Module, stream: PackedStream) -> tuple[Tensor, Callable]:
        stream = stream.to(groups.device)
        hidden = forward_stream(chunk, stream, groups)

        def rows(hidden: Tensor, non_loss_data: bool = True) -> Tensor:
            return keep(response_rows(hidden.squeeze(1), stream, groups, sequence_parallel=sequence_parallel))

        return hidden, rows

    if groups.pp_size == 1:  # inside another schedule's step
        return [rows(hidden) for hidden, rows in (forward(model.chunks[0], stream) for stream in streams)]
    no_sync, model.config.no_sync_func = model.config.no_sync_func, None  # left open by forward passes alone
    try:
        return run_schedule(model.chunks, streams, forward, groups, forward_only=True, collect_outputs=True)
    finally:
        model.config.no_sync_func = no_sync
