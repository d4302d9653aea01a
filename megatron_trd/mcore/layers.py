"""What a decoder layer is made of: Megatron's own building blocks, or Transformer Engine's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from megatron_trd.mcore.acceleration import Acceleration
from megatron_trd.mcore.attention import PackedAttention
from megatron_trd.mcore.experts import grouped_experts, local_experts, moe_layer
from megatron_trd.mcore.lora import column_with_lora, row_with_lora

# Checkpoints have the names of layers that fuse a norm with the linear after it, as Megatron-LM's do.
_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NAMES = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


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


class FusedGradientsLayer(TransformerLayer):
    """A layer whose products add their weight gradients to `main_grad` themselves.

    Megatron's own linears do so with apex's kernel alone, and one of them is the output head, which knows another way
    (`head_gradient.py`): so it is the layers that are told, not the model.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        super().__init__(config, *args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClasses:
    """The building blocks of a layer. Both implementations have the same structure and, but for experts, names."""

    layer: type
    norm: type
    column_linear: type
    row_linear: type
    core_attention: type
    experts: ModuleSpec
    grouped_experts: bool
    """Whether the experts of a rank share one module, whose weights are numbered."""


def layer_classes(chosen: Acceleration) -> LayerClasses:
    """Return Megatron's own layers or Transformer Engine's."""
    layer = FusedGradientsLayer if chosen.fused_wgrad else TransformerLayer
    if chosen.layers == "local":
        return LayerClasses(
            layer=layer,
            norm=RMSNorm,
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            core_attention=PackedAttention,
            experts=local_experts(),
            grouped_experts=False,
        )
    from megatron.core.extensions import transformer_engine as te

    return LayerClasses(
        layer=layer,
        norm=te.TENorm,
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        core_attention=te.TEDotProductAttention,
        experts=grouped_experts(),
        grouped_experts=True,
    )


def block_spec(
    config: TransformerConfig, classes: LayerClasses, lora: LoraConfig | None, sparse_layers: Sequence[bool]
) -> TransformerBlockSubmodules:
    """Describe layers of the decoder to Megatron, with experts or without.

    With `lora` the four fused linears carry adapters; in a model with experts only the two of attention.
    """
    column, row = classes.column_linear, classes.row_linear
    dense = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if lora is not None:
        column, row = column_with_lora(column, lora), row_with_lora(row, lora)
        if config.num_moe_experts is None:
            dense = MLPSubmodules(linear_fc1=column, linear_fc2=row)
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

    def layer(sparse: bool) -> ModuleSpec:
        return ModuleSpec(
            module=classes.layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=classes.norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=classes.norm,
                mlp=moe_layer(classes.experts) if sparse else ModuleSpec(module=MLP, submodules=dense),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=_NAMES if sparse else _NAMES | _DENSE_NAMES,
            ),
        )

    return TransformerBlockSubmodules(layer_specs=list(map(layer, sparse_layers)), layer_norm=classes.norm)
