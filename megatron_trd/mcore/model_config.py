"""From a Hugging Face config and our flags to Megatron's `TransformerConfig`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_trd.config.schema import ModelConfig
from megatron_trd.mcore.experts import expert_config
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel


def transformer_config(
    hf: HFModel,
    model: ModelConfig,
    groups: Groups,
    *,
    sequence_parallel: bool,
    virtual_stages: int,
    grouped_experts: bool,
) -> TransformerConfig:
    """Translate a Hugging Face config to Megatron's."""
    dtype = torch.bfloat16 if model.bf16 else torch.float32
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
        use_cpu_initialization=groups.device.type != "cuda",
        bias_activation_fusion=True,  # SwiGLU keeps its input alone, and computes the rest again
        # Fusions that need apex or Transformer Engine.
        gradient_accumulation_fusion=False,  # but see FusedGradientsLayer
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # A batch mixes up the directions, and waiting for each message locks up, between two interleaved stages.
        batch_p2p_comm=False,
        overlap_p2p_comm=virtual_stages > 1,
        calculate_per_token_loss=True,  # the weights of the tokens already carry the normaliser
        **_fp8(model),
        **_activation_memory(model),
        **expert_config(hf, groups, aux_loss_coeff=model.moe_aux_loss_coeff, grouped=grouped_experts),
    )


def _fp8(model: ModelConfig) -> dict[str, Any]:
    if model.fp8_format is None:
        return {}
    return {
        "fp8": model.fp8_format,
        "fp8_recipe": model.fp8_recipe,
        "fp8_margin": model.fp8_margin,
        "fp8_amax_history_len": model.fp8_amax_history_len,
        "fp8_amax_compute_algo": model.fp8_amax_compute_algo,
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
        # Weights cached in FP8 are renewed by the schedule alone; a forward pass outside it, after an update, would
        # compute with the old ones.
        "disable_parameter_transpose_cache": True,
    }


def _activation_memory(model: ModelConfig) -> dict[str, Any]:
    if model.cpu_offloading_num_layers:
        return {"cpu_offloading": True, "cpu_offloading_num_layers": model.cpu_offloading_num_layers}
    if model.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    if model.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": model.recompute_method,
            "recompute_num_layers": model.recompute_num_layers,
        }
    return {}
