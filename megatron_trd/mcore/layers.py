"""What a decoder layer is made of: Megatron's own building blocks, or Transformer Engine's."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_trd.config.schema import LoraConfig
from megatron_trd.mcore.attention import PackedAttention
from megatron_trd.mcore.lora import column_with_lora, row_with_lora


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that sequence parallelism may use (Megatron's torch norm refuses it).

    Normalises in fp32 and multiplies by the weight after casting back, as Hugging Face's Qwen3 does.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Tells Megatron to sum this gradient over the tensor-parallel ranks: each sees its tokens only.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if x.dtype != torch.float64 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClasses:
    """The four building blocks of a layer. Both implementations have the same structure and parameter names."""

    norm: type
    column_linear: type
    row_linear: type
    core_attention: type


def layer_classes(transformer_impl: Literal["auto", "local", "transformer_engine"]) -> LayerClasses:
    """Choose Megatron's own layers or Transformer Engine's.

    Raises:
        ValueError: Transformer Engine is asked for and cannot be used here.
    """
    found = importlib.util.find_spec("transformer_engine")
    # An uninstalled package may leave an empty folder behind: importable as a namespace, with nothing in it.
    usable = torch.cuda.is_available() and found is not None and found.origin is not None
    if transformer_impl == "transformer_engine" and not usable:
        raise ValueError(
            "--transformer-impl transformer_engine: needs CUDA and an installed transformer_engine; use local or auto"
        )
    if transformer_impl == "local" or not usable:
        return LayerClasses(
            norm=RMSNorm,
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            core_attention=PackedAttention,
        )
    from megatron.core.extensions import transformer_engine as te

    return LayerClasses(
        norm=te.TENorm,
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        core_attention=te.TEDotProductAttention,
    )


def block_spec(
    config: TransformerConfig, classes: LayerClasses, lora: LoraConfig | None, num_layers: int
) -> TransformerBlockSubmodules:
    """Describe `num_layers` of the decoder to Megatron; with `lora` the four fused linears carry adapters."""
    column, row = classes.column_linear, classes.row_linear
    if lora is not None:
        column, row = column_with_lora(column, lora), row_with_lora(row, lora)
    qk_norm = classes.norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.padding_causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=classes.core_attention,
            linear_proj=row,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=classes.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=classes.norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=classes.norm)
