"""The grid of ranks. The only place that knows Megatron's `parallel_state`."""

from __future__ import annotations

import math
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
    pp: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    cp: dist.ProcessGroup
    cp_size: int
    cp_rank: int
    tp_cp: dist.ProcessGroup
    """Ranks that share one stream under sequence parallelism; rank = cp_rank * tp_size + tp_rank."""
    ep: dist.ProcessGroup
    """Ranks that share out the experts of a layer; each has as many, in the order of the ranks."""
    ep_size: int
    ep_rank: int
    etp: dist.ProcessGroup
    """Ranks that share the matrices of one expert."""
    etp_size: int
    etp_rank: int
    expert_dp: dist.ProcessGroup
    """Ranks with the same part of the same experts."""
    dp_size: int
    dp_rank: int
    """Which micro-batches are this rank's: equal on all ranks that share a stream."""
    dp_cp: dist.ProcessGroup
    """Ranks with the same weights: gradients are summed over them, the distributed optimizer is sharded over them."""

    @property
    def is_last_stage(self) -> bool:
        """Whether hidden states meet the loss here."""
        return self.pp_rank == self.pp_size - 1


def initialize_groups(config: ParallelConfig, seed: int, local_rank: int) -> Groups:
    """Build the grid from `torch.distributed`'s environment (torchrun) and seed every generator.

    Collective over all ranks.

    Args:
        local_rank: index of this process's device on its machine (ignored without CUDA).

    Raises:
        ValueError: the number of processes is not a multiple of the ranks that hold a model, or all of its experts.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = use_cpu_where_there_is_no_cuda()
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    _require_whole_models(config, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * pp_rank)  # stages must not draw the same adapters
    return Groups(
        device=device,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        tp_size=config.tensor_model_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        pp_size=config.pipeline_model_parallel_size,
        pp_rank=pp_rank,
        cp=parallel_state.get_context_parallel_group(),
        cp_size=config.context_parallel_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        ep_size=config.expert_model_parallel_size,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _require_whole_models(config: ParallelConfig, world_size: int) -> None:
    size = config.model_parallel_size
    if world_size % size:
        tp, pp, cp = (
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.context_parallel_size,
        )
        raise ValueError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp}: "
            f"{size} must divide the number of processes, {world_size}; start torchrun with --nproc-per-node {size} "
            "(or a multiple)"
        )
    ep, etp = config.expert_model_parallel_size, config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    size = ep * etp * config.pipeline_model_parallel_size
    if world_size % size:
        raise ValueError(
            f"--expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp} x --pipeline-model-parallel-size "
            f"{config.pipeline_model_parallel_size}: {size} must divide the number of processes, {world_size}; use "
            f"fewer, or --nproc-per-node {math.lcm(size, config.model_parallel_size)} (or a multiple)"
        )


def destroy_groups() -> None:
    """Forget the grid and end `torch.distributed`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
