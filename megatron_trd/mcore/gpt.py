"""A Megatron GPTModel that stops at hidden states, from any Hugging Face config of a known family."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
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

from megatron_trd.config.schema import LoraConfig, ModelConfig
from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore.attention import PackedAttention
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
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


def block_spec(config: TransformerConfig, classes: LayerClasses, lora: LoraConfig | None) -> TransformerBlockSubmodules:
    """Describe the decoder to Megatron; with `lora` the four fused linears carry adapters."""
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
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=classes.norm)


def transformer_config(
    hf: HFModel, model: ModelConfig, groups: Groups, *, sequence_parallel: bool
) -> TransformerConfig:
    """Translate a Hugging Face config to Megatron's."""
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    recompute: dict[str, Any] = {}
    if model.recompute_granularity == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": model.recompute_num_layers,
        }
    return TransformerConfig(
        num_layers=hf.geometry.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.geometry.num_query_groups * hf.geometry.heads_per_group,
        num_query_groups=hf.geometry.num_query_groups,
        kv_channels=hf.geometry.head_dim,
        layernorm_epsilon=hf.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        qk_layernorm=hf.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=groups.tp_size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.bf16,
        use_cpu_initialization=groups.device.type == "cpu",
        # Fusions that need apex, or a compiler on the CPU.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        calculate_per_token_loss=True,  # the weights of the tokens already carry the normaliser
        **recompute,
    )


class HiddenStatesGPT(GPTModel):
    """GPTModel whose forward pass ends before the output layer: logits are the loss's business, in chunks."""

    hf: HFModel

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def output_weight(self) -> Tensor:
        """The head's rows on this rank: [padded vocabulary / tp, hidden]; the embedding's own when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def forward_stream(model: torch.nn.Module, stream: PackedStream) -> Tensor:
    """Run a model (or its DDP wrapper) over a packed stream on its device.

    Returns:
        Hidden states [T, hidden], or this rank's [T / tp, hidden] under sequence parallelism.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=stream.cu_seqlens,
        cu_seqlens_kv=stream.cu_seqlens,
        max_seqlen_q=stream.max_seqlen,
        max_seqlen_kv=stream.max_seqlen,
    )
    return model(stream.input_ids[None], None, None, packed_seq_params=packed).squeeze(1)


def build_gpt(
    hf: HFModel,
    model: ModelConfig,
    groups: Groups,
    *,
    sequence_parallel: bool,
    lora: LoraConfig | None = None,
) -> HiddenStatesGPT:
    """Build an (untrained) model on this rank's device. Weights come from `hf_weights.load`."""
    config = transformer_config(hf, model, groups, sequence_parallel=sequence_parallel)
    gpt = HiddenStatesGPT(
        config,
        block_spec(config, layer_classes(model.transformer_impl), lora),
        vocab_size=hf.geometry.padded_vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        share_embeddings_and_output_weights=hf.tied,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=hf.rope_theta,
    )
    gpt.hf = hf
    gpt.to(device=groups.device, dtype=config.params_dtype)
    if lora is not None:
        _train_adapters_only(gpt)
    return gpt


def _train_adapters_only(gpt: HiddenStatesGPT) -> None:
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if gpt.config.recompute_granularity == "full":
        # A checkpointed block whose input needs no gradient passes none to the adapters inside it.
        gpt.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
