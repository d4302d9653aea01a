"""LoRA on Megatron's parallel linears: adapters live beside the frozen weight, only r-wide tensors travel.

y = W x + (alpha / r) B A dropout(x), with A [r, in] and B [out, r] (Hu et al., arXiv 2106.09685).

- column-parallel: A is replicated, B is split with the outputs; z = A x is gathered (sequence parallelism) or
  copied to the tensor-parallel ranks before B;
- row-parallel: A is split with the inputs, B is replicated; the partial z = A x is reduced before B.

A fused linear (q,k,v or gate,up) shares one A. As PEFT adapters that is the same A in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_trd.config.schema import LoraConfig


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A in the weight's dtype; the sum is taken in fp32."""
    return (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)


class LoRALinear(torch.nn.Module):
    """Mix-in before a Megatron parallel linear: the base keeps its parameter names, `lora_a` and `lora_b` join it."""

    weight: torch.nn.Parameter
    config: TransformerConfig
    lora: LoraConfig
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    lora_scale: float
    """alpha / rank"""
    adapter_enabled: bool = True
    tp_dims: dict[str, int]
    """Dimension that tensor parallelism splits, by parameter; the others are replicated."""

    def _add_adapter(self, fan_in: int, in_features: int, out_features: int, split: dict[str, int]) -> None:
        """Add A ~ U(-1, 1) / sqrt(fan_in), whose whole width `fan_in` is, and B = 0; features are this rank's."""
        rank, weight = self.lora.lora_rank, self.weight
        self.lora_a = torch.nn.Parameter(weight.new_empty(rank, in_features))
        self.lora_b = torch.nn.Parameter(weight.new_zeros(out_features, rank))
        self.lora_scale = self.lora.lora_alpha / rank
        self.tp_dims = {**self.tp_dims, **split}
        for name in ("lora_a", "lora_b"):
            parameter = getattr(self, name)
            if name in split:
                set_tensor_model_parallel_attributes(parameter, True, split[name], 1)
            else:  # each rank sees its own tokens only: Megatron must sum the gradient
                parameter.sequence_parallel = self.config.sequence_parallel
        # A split parameter is drawn per rank, a replicated one must be equal on all ranks.
        with get_cuda_rng_tracker().fork() if "lora_a" in split else nullcontext():
            torch.nn.init.uniform_(self.lora_a, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _dropped(self, x: Tensor, *, differs_by_rank: bool) -> Tensor:
        """Dropout with the same mask on all tensor-parallel ranks where they hold the same activations."""
        if not self.training or self.lora.lora_dropout == 0.0:
            return x
        if not differs_by_rank:
            return F.dropout(x, self.lora.lora_dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x, self.lora.lora_dropout)

    def merged_weight(self) -> Tensor:
        """This rank's part of the weight with its adapter in it."""
        return merged(self.weight, self.lora_a, self.lora_b, self.lora_scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe weight and adapter to Megatron's distributed checkpoint."""
        tensors = {k: v for k, v in self.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        sharded = make_sharded_tensors_for_checkpoint(
            tensors,
            prefix,
            self.tp_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if prefix.endswith("linear_fc1."):  # gate and up are split separately
            key = f"{prefix}lora_b"
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        return sharded


@cache
def column_with_lora(base: Any, lora: LoraConfig) -> type:
    """Return `base`, a column-parallel linear, with an adapter."""

    class LoRAColumnParallelLinear(LoRALinear, base):
        def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, **kwargs)
            self.lora, self.tp_dims = lora, {"weight": 0, "bias": 0}
            self._add_adapter(input_size, input_size, self.weight.size(0), {"lora_b": 0})

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x, *args, **kwargs)
            if not self.adapter_enabled:
                return out, bias
            sequence_parallel = self.config.sequence_parallel
            z = F.linear(self._dropped(x, differs_by_rank=sequence_parallel), self.lora_a)
            if sequence_parallel:
                z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True)
            else:
                z = copy_to_tensor_model_parallel_region(z)
            return out + F.linear(z, self.lora_b) * self.lora_scale, bias

    return LoRAColumnParallelLinear


@cache
def row_with_lora(base: Any, lora: LoraConfig) -> type:
    """Return `base`, a row-parallel linear, with an adapter."""

    class LoRARowParallelLinear(LoRALinear, base):
        def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, **kwargs)
            self.lora, self.tp_dims = lora, {"weight": 1}
            self._add_adapter(input_size, self.weight.size(1), output_size, {"lora_a": 1})

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x, *args, **kwargs)
            if not self.adapter_enabled:
                return out, bias
            z = F.linear(self._dropped(x, differs_by_rank=True), self.lora_a)
            if self.config.sequence_parallel:
                z = reduce_scatter_to_sequence_parallel_region(z)
            else:
                z = reduce_from_tensor_model_parallel_region(z)
            return out + F.linear(z, self.lora_b) * self.lora_scale, bias

    return LoRARowParallelLinear


@contextmanager
def adapters_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Run the model as its frozen base: the OPSD teacher needs no second copy of the weights."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for module in adapters:
        module.adapter_enabled = False
    try:
        yield
    finally:
        for module in adapters:
            module.adapter_enabled = True
