"""The transport that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from megatron_trd.config.schema import Config
from megatron_trd.weight_sync.adapter import AdapterWeightSync
from megatron_trd.weight_sync.base import WeightServers, WeightSync
from megatron_trd.weight_sync.disk import DiskWeightSync
from megatron_trd.weight_sync.distributed import DistributedWeightSync
from megatron_trd.weight_sync.tensors import TensorWeightSync


def make_weight_sync(config: Config, servers: WeightServers) -> WeightSync:
    """Make the transport of `--weight-sync`. Nothing is sent yet.

    Raises:
        ValueError: `--hf-checkpoint` does not tell what an export looks like.
    """
    settings, checkpoint = config.weight_sync, config.model.hf_checkpoint
    timeout_s, check_equal = settings.weight_sync_timeout_s, settings.check_weight_update_equal
    bucket_bytes = settings.weight_sync_bucket_mb << 20
    match settings.weight_sync:
        case "disk":
            directory = settings.weight_sync_dir or Path(config.checkpoint.run_dir) / "weights"
            return DiskWeightSync(directory, checkpoint, servers, timeout_s=timeout_s, check_equal=check_equal)
        case "distributed":
            return DistributedWeightSync(
                checkpoint,
                servers,
                bucket_bytes=bucket_bytes,
                address=settings.weight_sync_address,
                timeout_s=timeout_s,
                check_equal=check_equal,
            )
        case "tensor":
            return TensorWeightSync(
                checkpoint, servers, bucket_bytes=bucket_bytes, timeout_s=timeout_s, check_equal=check_equal
            )
        case "adapter":
            return AdapterWeightSync(config.lora, checkpoint, servers, timeout_s=timeout_s)
