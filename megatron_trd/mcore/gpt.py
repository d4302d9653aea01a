"""A Megatron GPTModel that stops at hidden states, from any Hugging Face config of a known family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_trd.config.schema import LoraConfig, ModelConfig
from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore.acceleration import Machine, choose
from megatron_trd.mcore.context_parallel import sliced_seq_params, tokens_of_rank
from megatron_trd.mcore.experts import sum_gradients_over_copies
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.layers import block_spec, layer_classes
from megatron_trd.mcore.model_config import transformer_config
from megatron_trd.mcore.stages import Stages, cut_into_stages


class HiddenStatesGPT(GPTModel):
    """GPTModel, or a chunk of one, that ends before the output layer: logits are the loss's business, in pieces."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple:
        inputs = list(super()._preprocess(*args, **kwargs))
        if inputs[5] is not None and self.config.sequence_parallel and not self.pre_process:
            # The padding mask: Megatron cuts it for sequence parallelism on the first stage alone.
            inputs[5] = inputs[5].chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        return tuple(inputs)

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

    @property
    def head_is_embedding(self) -> bool:
        """Whether the output layer's weight is the embedding's very tensor, which learns from both."""
        return self.hf.tied and self.chunks[-1].pre_process


def forward_stream(chunk: torch.nn.Module, stream: PackedStream, groups: Groups) -> Tensor:
    """Run a chunk (or its DDP wrapper) over this rank's slice of a packed stream that lies on its device.

    Returns:
        Hidden states [T / cp, 1, hidden], or this rank's [T / cp / tp, 1, hidden] under sequence parallelism.
    """
    if groups.cp_size > 1:
        mine = tokens_of_rank(stream.cu_seqlens, groups.cp_size, groups.cp_rank)
        input_ids, is_padding = stream.input_ids[mine], stream.is_padding[mine]
        packed = sliced_seq_params(stream.cu_seqlens, stream.max_seqlen, groups.cp_size, groups.cp_rank)
    else:
        input_ids, is_padding = stream.input_ids, stream.is_padding
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=stream.cu_seqlens,
            cu_seqlens_kv=stream.cu_seqlens,
            max_seqlen_q=stream.max_seqlen,
            max_seqlen_kv=stream.max_seqlen,
        )
    return chunk(input_ids[None], None, None, packed_seq_params=packed, padding_mask=is_padding[None])


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
        ValueError: the layers cannot be cut into the stages; a flag does not fit this machine.
    """
    stages = cut_into_stages(hf, groups.pp_size, virtual_stages)
    classes = layer_classes(choose(model, Machine.here(), lora=lora is not None))
    config = transformer_config(
        hf,
        model,
        groups,
        sequence_parallel=sequence_parallel,
        virtual_stages=virtual_stages,
        grouped_experts=classes.grouped_experts,
    )
    sparse_layers = hf.moe.sparse_layers if hf.moe is not None else (False,) * hf.geometry.num_layers

    def build(index: int) -> HiddenStatesGPT:
        first = (index * groups.pp_size + groups.pp_rank) * stages.layers_per_chunk
        chunk = HiddenStatesGPT(
            config,
            block_spec(config, classes, lora, sparse_layers[first : first + stages.layers_per_chunk]),
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
        sum_gradients_over_copies(chunk)
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
