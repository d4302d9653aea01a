"""The shape of a decoder, read from a Hugging Face `config.json` alone, and how many parameters a rank holds of it.

A second reader beside `mcore.hf_config`, because that one needs transformers and torch: a plan shall run anywhere,
in a second. What the trainer supports is decided there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SUPPORTED = ("qwen3", "qwen3_moe", "qwen2", "llama")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts in place of the feed-forward of some layers."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    sparse_layers: tuple[bool, ...]
    """For each layer, whether it has experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder; `vocab_size` holds the padding once `padded_to` has added it."""

    path: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    experts: Experts | None

    @property
    def query_size(self) -> int:
        """Width of all heads' queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys (or values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Outputs of the fused projection."""
        return self.query_size + 2 * self.kv_size

    def padded_to(self, rows: int) -> ModelShape:
        """The same model with its vocabulary padded to `rows`."""
        return replace(self, vocab_size=rows)

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and self.experts.sparse_layers[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameters by which ranks share a shard's optimizer state."""

    dense: int = 0
    """Same on all ranks of the data-parallel group."""
    expert: int = 0
    """Of experts: same on the ranks of the smaller expert-data-parallel group."""

    def __add__(self, other: Count) -> Count:
        return Count(dense=self.dense + other.dense, expert=self.expert + other.expert)

    @property
    def total(self) -> int:
        """Both together."""
        return self.dense + self.expert


def attention_linears(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of the fused q, k, v projection and of the output projection."""
    return (shape.qkv_size, shape.hidden_size), (shape.hidden_size, shape.query_size)


def feed_forward_linears(shape: ModelShape, ffn: int) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of the fused gate and up projection and of the down projection, `ffn` wide."""
    return (2 * ffn, shape.hidden_size), (shape.hidden_size, ffn)


def layer_parameters(shape: ModelShape, layer: int, *, tp: int = 1, ep: int = 1, etp: int = 1) -> Count:
    """Count one layer's parameters on one rank."""
    dense = sum(out * inside for out, inside in attention_linears(shape)) // tp + 2 * shape.hidden_size
    if shape.qkv_bias:
        dense += shape.qkv_size // tp
    if shape.qk_norm:
        dense += 2 * shape.head_dim
    experts = shape.experts
    if experts is None or not shape.is_sparse(layer):
        linears = feed_forward_linears(shape, shape.ffn_hidden_size)
        return Count(dense=dense + sum(out * inside for out, inside in linears) // tp)
    linears = feed_forward_linears(shape, experts.ffn_hidden_size)
    expert = experts.num_experts // ep * (sum(out * inside for out, inside in linears) // etp)
    return Count(dense=dense + experts.num_experts * shape.hidden_size, expert=expert)


def adapter_parameters(shape: ModelShape, layer: int, rank: int, *, tp: int = 1) -> int:
    """Count one layer's LoRA parameters on one rank: the side that tensor parallelism splits, and the other whole."""
    pairs = [attention_linears(shape)]
    if not shape.is_sparse(layer):
        pairs.append(feed_forward_linears(shape, shape.ffn_hidden_size))
    return sum(rank * ((column[0] + row[1]) // tp + column[1] + row[0]) for column, row in pairs)


def num_parameters(shape: ModelShape) -> int:
    """Count all parameters, the vocabulary's padding included."""
    layers = sum(layer_parameters(shape, layer).total for layer in range(shape.num_layers))
    return layers + (1 if shape.tied else 2) * shape.vocab_size * shape.hidden_size + shape.hidden_size


def read_model_shape(path: str | Path, flag: str) -> ModelShape:
    """Read `config.json`; the vocabulary is not padded yet.

    Args:
        flag: flag that gave the path, for error messages.

    Raises:
        ValueError: no such file, an unknown model type, or a size that is not in it.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"--{flag} {path}: no config.json there; give a Hugging Face model directory")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ValueError(f"--{flag} {path}: model type {kind!r} is not supported; use one of {', '.join(SUPPORTED)}")
    try:
        layers, hidden, heads = (config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        return ModelShape(
            path=str(path),
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            qk_norm=kind.startswith("qwen3"),
            qkv_bias=kind == "qwen2",
            experts=_experts(config, layers) if kind == "qwen3_moe" else None,
        )
    except KeyError as error:
        raise ValueError(f"--{flag} {path}: config.json has no {error}; give a complete one") from error


def _experts(config: dict[str, Any], layers: int) -> Experts:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    num = config.get("num_experts") or config["num_local_experts"]
    return Experts(
        num_experts=num,
        top_k=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        sparse_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
    )
