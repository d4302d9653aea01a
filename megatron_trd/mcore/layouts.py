"""The two-way table between Megatron's parameters and Hugging Face's.

A row says: this Megatron parameter is made of these Hugging Face tensors, fused and sharded in this way. Loading,
export, adapters and tests all read the same rows, so no direction can drift from the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["replicated", "vocab", "row", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What differs between decoder families, as far as Megatron is concerned."""

    qk_norm: bool
    qkv_bias: bool


FAMILIES = {
    "qwen3": Family(qk_norm=True, qkv_bias=False),
    "qwen2": Family(qk_norm=False, qkv_bias=True),
    "llama": Family(qk_norm=False, qkv_bias=False),
    "qwen3_moe": Family(qk_norm=True, qkv_bias=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes that fusing and sharding need."""

    num_layers: int
    num_query_groups: int
    heads_per_group: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """The experts of a model, where it has some."""

    num_experts: int
    top_k: int
    """Experts that each token is sent to."""
    expert_ffn_hidden_size: int
    norm_topk_prob: bool
    """Whether the weights of a token's experts are scaled to sum to one."""
    sparse_layers: tuple[bool, ...]
    """For each layer, whether it has experts; the others have a dense feed-forward of the model's own width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it holds."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    adapted: bool = False
    """Whether it is the weight of a linear that carries adapters under LoRA."""
    expert: int | None = None
    """The expert of its layer that it belongs to; None for what all ranks of the stage hold."""

    @property
    def tp_dim(self) -> int | None:
        """Dimension that tensor parallelism splits; None when every rank holds all of it."""
        return {"replicated": None, "row": 1}.get(self.kind, 0)


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV = ("q_proj", "k_proj", "v_proj")
ADAPTED = {  # Megatron's module -> Hugging Face's modules: the seven projections of a LoRA
    "self_attention.linear_qkv": tuple(f"self_attn.{name}" for name in _QKV),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_KIND_OF_ADAPTED: dict[str, Kind] = {
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "row",
    "mlp.linear_fc1": "gate_up",
    "mlp.linear_fc2": "row",
}


def adapted_modules(moe: MoEShape | None) -> tuple[str, ...]:
    """Return the modules that LoRA adapts. In a model with experts it is attention alone: what the experts are to
    servers, one tensor each or one for all, has no common name in PEFT's format."""
    return tuple(module for module in ADAPTED if moe is None or module.startswith("self_attention."))


def rows(family: Family, geometry: Geometry, *, tied: bool, moe: MoEShape | None = None) -> Iterator[Row]:
    """Yield every row of a model, in the order of the layers."""
    yield Row(megatron=EMBEDDING, hf=("model.embed_tokens.weight",), kind="vocab")
    for i in range(geometry.num_layers):
        here, there = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield Row(megatron=f"{here}input_layernorm.weight", hf=(f"{there}input_layernorm.weight",), kind="replicated")
        sparse = moe is not None and moe.sparse_layers[i]
        for module, names in ADAPTED.items():
            if not (sparse and module.startswith("mlp.")):
                yield Row(
                    megatron=f"{here}{module}.weight",
                    hf=tuple(f"{there}{name}.weight" for name in names),
                    kind=_KIND_OF_ADAPTED[module],
                    adapted=module in adapted_modules(moe),
                )
        if moe is not None and sparse:
            yield from _expert_rows(here, there, moe.num_experts)
        if family.qkv_bias:
            yield Row(
                megatron=f"{here}self_attention.linear_qkv.bias",
                hf=tuple(f"{there}self_attn.{name}.bias" for name in _QKV),
                kind="qkv",
            )
        if family.qk_norm:
            for side in "qk":
                yield Row(
                    megatron=f"{here}self_attention.{side}_layernorm.weight",
                    hf=(f"{there}self_attn.{side}_norm.weight",),
                    kind="replicated",
                )
        yield Row(
            megatron=f"{here}pre_mlp_layernorm.weight",
            hf=(f"{there}post_attention_layernorm.weight",),
            kind="replicated",
        )
    yield Row(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",), kind="replicated")
    if not tied:
        yield Row(megatron=HEAD, hf=("lm_head.weight",), kind="vocab")


def _expert_rows(here: str, there: str, num_experts: int) -> Iterator[Row]:
    yield Row(megatron=f"{here}mlp.router.weight", hf=(f"{there}mlp.gate.weight",), kind="replicated")
    for expert in range(num_experts):
        for module in ("linear_fc1", "linear_fc2"):
            names = (name.removeprefix("mlp.") for name in ADAPTED[f"mlp.{module}"])
            yield Row(
                megatron=f"{here}mlp.experts.local_experts.{expert}.{module}.weight",
                hf=tuple(f"{there}mlp.experts.{expert}.{name}.weight" for name in names),
                kind=_KIND_OF_ADAPTED[f"mlp.{module}"],
                expert=expert,
            )


def shard(row: Row, tensors: Sequence[Tensor], geometry: Geometry, tp_size: int, tp_rank: int) -> Tensor:
    """Fuse the row's Hugging Face tensors (whole) and return this tensor-parallel rank's part.

    Vocabulary padding is filled with zeros.
    """
    match row.kind:
        case "qkv":
            groups = [t.unflatten(0, (geometry.num_query_groups, -1)) for t in tensors]
            return torch.cat(groups, dim=1).flatten(0, 1).chunk(tp_size)[tp_rank]
        case "gate_up":
            return torch.cat([t.chunk(tp_size)[tp_rank] for t in tensors])
        case "vocab":
            padding = geometry.padded_vocab_size - tensors[0].size(0)
            padded = torch.nn.functional.pad(tensors[0], (0, 0, 0, padding))
            return padded.chunk(tp_size)[tp_rank]
    (tensor,) = tensors
    return tensor if row.tp_dim is None else tensor.chunk(tp_size, row.tp_dim)[tp_rank]


def merge(row: Row, shards: Sequence[Tensor], geometry: Geometry) -> list[Tensor]:
    """Undo `shard`: from every tensor-parallel rank's part to the row's Hugging Face tensors."""
    match row.kind:
        case "qkv":
            head = geometry.head_dim
            fused = torch.cat(list(shards)).unflatten(0, (geometry.num_query_groups, -1))
            parts = fused.split([geometry.heads_per_group * head, head, head], dim=1)
            return [part.flatten(0, 1) for part in parts]
        case "gate_up":
            halves = [s.chunk(2) for s in shards]
            return [torch.cat([half[i] for half in halves]) for i in range(2)]
        case "vocab":
            return [torch.cat(list(shards))[: geometry.vocab_size]]
    return [shards[0] if row.tp_dim is None else torch.cat(list(shards), row.tp_dim)]
