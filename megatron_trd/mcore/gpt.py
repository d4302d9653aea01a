"""A Megatron GPTModel that stops at hidden states, from any Hugging Face config of a known family."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
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
from megatron_trd.mcore.context_parallel import sliced_seq_params, tokens_of_rank
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.lora import column_with_lora, row_with_lora
from megatron_trd.mcore.stages import Stages, cut_into_stages


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


def transformer_config(
    hf: HFModel, model: ModelConfig, groups: Groups, *, sequence_parallel: bool, virtual_stages: int
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
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        context_parallel_size=groups.cp_size,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=True,  # packed streams differ in length
        moe_token_dispatcher_type="alltoall",  # which variable lengths ask for, experts or not
        deallocate_pipeline_outputs=True,
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
        # A batch mixes up the directions, and waiting for each message locks up, between two interleaved stages.
        batch_p2p_comm=False,
        overlap_p2p_comm=virtual_stages > 1,
        calculate_per_token_loss=True,  # the weights of the tokens already carry the normaliser
        **recompute,
    )


class HiddenStatesGPT(GPTModel):
    """GPTModel, or a chunk of one, that ends before the output layer: logits are the loss's business, in pieces."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.post_process:  # the head is not called here, but its weight must have arrived (--overlap-param-gather)
            for wait in self.output_layer._forward_pre_hooks.values():
                wait(self.output_layer, ())
        return hidden_states


class GPTChunks(torch.nn.ModuleList):
    """This rank's part of a model: the chunks of its pipeline stage, in the order of their layers."""

    def __init__(self, hf: HFModel, stages: Stages, chunks: Iterable[HiddenStatesGPT]) -> None:
        super().__init__(chunks)
        self.hf, self.stages = hf, stages
        self.config: TransformerConfig = self.chunks[0].config

    @property
    def chunks(self) -> list[HiddenStatesGPT]:
        """The same as a list."""
        return [chunk for chunk in self if isinstance(chunk, HiddenStatesGPT)]

    @property
    def output_weight(self) -> Tensor:
        """The head's rows on this rank: [padded vocabulary / tp, hidden]; the embedding's own, or a copy, when tied.

        Last stage only.
        """
        last = self.chunks[-1]
        return last.shared_embedding_or_output_weight() if self.hf.tied else last.output_layer.weight


def forward_stream(chunk: torch.nn.Module, stream: PackedStream, groups: Groups) -> Tensor:
    """Run a chunk (or its DDP wrapper) over this rank's slice of a packed stream that lies on its device.

    Returns:
        Hidden states [T / cp, 1, hidden], or this rank's [T / cp / tp, 1, hidden] under sequence parallelism.
    """
    if groups.cp_size > 1:
        input_ids = stream.input_ids[tokens_of_rank(stream.cu_seqlens, groups.cp_size, groups.cp_rank)]
        packed = sliced_seq_params(stream.cu_seqlens, stream.max_seqlen, groups.cp_size, groups.cp_rank)
    else:
        input_ids = stream.input_ids
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=stream.cu_seqlens,
            cu_seqlens_kv=stream.cu_seqlens,
            max_seqlen_q=stream.max_seqlen,
            max_seqlen_kv=stream.max_seqlen,
        )
    return chunk(input_ids[None], None, None, packed_seq_params=packed)


def build_gpt(
    hf: HFModel,
    model: ModelConfig,
    groups: Groups,
    *,
    sequence_parallel: bool,
    virtual_stages: int = 1,
    lora: LoraConfig | None = None,
) -> GPTChunks:
    """Build this rank's chunks of an (untrained) model on its device. Weights come from `hf_weights.load`.

    Raises:
        ValueError: the layers cannot be cut into the stages.
    """
    stages = cut_into_stages(hf, groups.pp_size, virtual_stages)
    config = transformer_config(hf, model, groups, sequence_parallel=sequence_parallel, virtual_stages=virtual_stages)
    spec = block_spec(config, layer_classes(model.transformer_impl), lora, stages.layers_per_chunk)

    def build(index: int) -> HiddenStatesGPT:
        chunk = HiddenStatesGPT(
            config,
            spec,
            vocab_size=hf.geometry.padded_vocab_size,
            max_sequence_length=hf.max_position_embeddings,
            pre_process=groups.pp_rank == 0 and index == 0,
            post_process=groups.is_last_stage and index == virtual_stages - 1,
            share_embeddings_and_output_weights=hf.tied,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=hf.rope_theta,
            vp_stage=index if virtual_stages > 1 else None,
        )
        if lora is not None:
            _train_adapters_only(chunk)
        return chunk.to(device=groups.device, dtype=config.params_dtype)

    return GPTChunks(hf, stages, map(build, range(virtual_stages)))


def _train_adapters_only(chunk: HiddenStatesGPT) -> None:
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        # A checkpointed block whose input needs no gradient passes none to the adapters inside it.
        chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
