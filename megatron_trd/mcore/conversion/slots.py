"""Where a distributed checkpoint keeps each parameter. The model itself says so; it is built without data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_trd.config.schema import LoraConfig, ModelConfig
from megatron_trd.mcore.gpt import build_gpt
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One whole parameter's place in the tensor of a checkpoint, in which Megatron stacks the layers of a model."""

    key: str
    """Name of the checkpoint's tensor."""
    size: tuple[int, ...]
    """Shape of the checkpoint's tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of the parameter: `size` without the leading axes along which parameters are stacked."""

    @property
    def index(self) -> tuple[int, ...]:
        """The parameter's place along the stacked axes."""
        return self.offset[: len(self.size) - len(self.shape)]

    @property
    def extent(self) -> tuple[int, ...]:
        """The parameter's shape with the stacked axes, of length 1, before it."""
        return (1,) * len(self.index) + self.shape


def slots_of(hf: HFModel, groups: Groups, lora: LoraConfig | None = None) -> dict[str, Slot]:
    """Return the slot of every parameter by its name in the whole model.

    Args:
        hf: with its vocabulary padded as in the checkpoint.
        groups: without tensor, pipeline, context or expert parallelism.
        lora: whether the model carries adapters.
    """
    options = ModelConfig(hf_checkpoint=str(hf.path), transformer_impl="local")
    nowhere = torch.device("meta")
    with nowhere:
        gpt = build_gpt(hf, options, replace(groups, device=nowhere), sequence_parallel=False, lora=lora)
    (chunk,) = gpt.chunks
    sharded = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    return {name: slot for name, entry in sharded.items() for slot in _slot(entry)}


def _slot(entry: object) -> Iterator[Slot]:
    if isinstance(entry, ShardedTensorFactory):  # saved in pieces, which follow each other
        first = entry.build()[0]
        yield Slot(key=first.key, size=first.global_shape, offset=first.global_offset, shape=tuple(entry.data.shape))
    elif isinstance(entry, ShardedTensor):
        yield Slot(key=entry.key, size=entry.global_shape, offset=entry.global_offset, shape=tuple(entry.local_shape))
