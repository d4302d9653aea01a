"""The grid of ranks. The only place that knows Megatron's `parallel_state`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.mcore.cpu_device import use_cpu_where_there_is_no_cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Process groups and this rank's place in them."""

    device: torch.device
    world_size: int
    rank: int
    tp: dist.ProcessGroup
    tp_size: int
    tp_rank: int
    dp: dist.ProcessGroup
    """Data-parallel ranks, context parallelism included."""
    dp_size: int
    dp_rank: int


def initialize_groups(config: ParallelConfig, seed: int, local_rank: int) -> Groups:
    """Build the grid from `torch.distributed`'s environment (torchrun) and seed every generator.

    Collective over all ranks.

    Args:
        local_rank: index of this process's device on its machine (ignored without CUDA).

    Raises:
        ValueError: the number of processes is not a multiple of the model-parallel size.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = use_cpu_where_there_is_no_cuda()
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    world_size, tp_size = dist.get_world_size(), config.tensor_model_parallel_size
    if world_size % tp_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size}: must divide the number of processes, {world_size}; "
            f"start torchrun with --nproc-per-node {tp_size} (or a multiple)"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size, distributed_timeout_minutes=config.distributed_timeout_minutes
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        device=device,
        world_size=world_size,
        rank=dist.get_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        tp_size=tp_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        dp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def destroy_groups() -> None:
    """Forget the grid and end `torch.distributed`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
