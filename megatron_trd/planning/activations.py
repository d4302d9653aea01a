"""Bytes that autograd keeps of one decoder layer, tensor by tensor, and what comes and goes beside them.

Letters: t tokens of this rank's slice of the stream, n those it holds between matrix products (t / tp under sequence
parallelism), a bytes of an element, h hidden, q and kv widths of queries and of keys, F feed-forward, D head width.
The sums are in docs/planning.md; the test beside this room compares them with an allocator's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_trd.planning.grid import Grid
from megatron_trd.planning.model_shape import Experts, ModelShape

Implementation = Literal["cpu", "local", "te"]
"""Megatron's own layers with attention on the CPU, the same with flash attention, Transformer Engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A packed stream, over all ranks that share it."""

    tokens: int
    places: int = 0
    """Sequences times the longest one, which attention on the CPU unpacks to; 0 = as many as tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What of a layer is kept, and in which form."""

    element: int
    """Bytes of a parameter or activation: 2 in bf16."""
    implementation: Implementation
    lora_rank: int = 0
    lora_dropout: bool = False
    fp8: bool = False
    """Linears keep their inputs in FP8."""
    recomputed: tuple[str, ...] = ()
    """Parts of a layer whose insides are computed again: `--recompute-modules`."""


def layer_bytes(shape: ModelShape, layer: int, grid: Grid, stream: Stream, precision: Precision) -> int:
    """Return what autograd keeps of one layer on one rank until its backward pass."""
    a, t, n = precision.element, stream.tokens / grid.cp, stream.tokens / grid.sequence_ranks
    h = shape.hidden_size
    total = 2 * _norm(h, 1, precision) * n
    if shape.qk_norm:
        total += _norm(shape.query_size, shape.num_heads, precision) * t / grid.tp
        total += _norm(shape.kv_size, shape.num_kv_heads, precision) * t / grid.tp
        if a == 4 and precision.implementation != "te":  # in fp32 the norm keeps its input, a view of all of q, k, v
            total += (shape.qkv_size - shape.kv_size) * 4 * t / grid.tp
    total += 4 * shape.head_dim * a * t  # cos and sin, for q and for k
    total += _attention(shape, grid, stream, precision)
    total += _linear_input(h, n, precision)  # of q, k, v
    if "layernorm" in precision.recomputed:
        total -= 2 * h * a * n
    if shape.experts is not None and shape.is_sparse(layer):
        total += _experts(shape, shape.experts, grid, n, precision)
    elif "mlp" in precision.recomputed:
        total += h * a * n
    else:
        ffn = shape.ffn_hidden_size
        total += _linear_input(h, n, precision)
        # gate|up, and what SwiGLU makes of them
        total += 2 * ffn * a * t / grid.tp + _linear_input(ffn, t / grid.tp, precision)
        total += 2 * _adapter(grid, t, precision)
    total += 2 * _adapter(grid, t, precision)
    return round(total)


def layer_transient_bytes(shape: ModelShape, layer: int, grid: Grid, stream: Stream, precision: Precision) -> int:
    """Return what a layer's backward pass needs beside what is kept: two gradients of the feed-forward's width more
    than it has freed by then (four where SwiGLU's is not compiled), that of the residual stream, and what it computes
    again."""
    a, t, n = precision.element, stream.tokens / grid.cp, stream.tokens / grid.sequence_ranks
    of_swiglu = 4 if precision.implementation == "cpu" else 2
    gradients = of_swiglu * _ffn_width(shape, layer, grid) * a * t + shape.hidden_size * a * n
    whole = replace(precision, recomputed=())
    again = layer_bytes(shape, layer, grid, stream, whole) - layer_bytes(shape, layer, grid, stream, precision)
    return round(gradients) + again


def forward_only_bytes(shape: ModelShape, layer: int, grid: Grid, stream: Stream, precision: Precision) -> int:
    """Return what a forward pass without gradients holds at its widest: a layer's feed-forward."""
    a, t, n = precision.element, stream.tokens / grid.cp, stream.tokens / grid.sequence_ranks
    of_swiglu = 4 if precision.implementation == "cpu" else 3
    return round(of_swiglu * _ffn_width(shape, layer, grid) * a * t + 4 * shape.hidden_size * a * n)


def norm_bytes(shape: ModelShape, grid: Grid, stream: Stream, precision: Precision) -> int:
    """Return what autograd keeps of one norm of hidden states."""
    return round(_norm(shape.hidden_size, 1, precision) * stream.tokens / grid.sequence_ranks)


def hidden_bytes(shape: ModelShape, grid: Grid, stream: Stream, precision: Precision) -> int:
    """Return the size of one rank's hidden states between two layers."""
    return round(shape.hidden_size * precision.element * stream.tokens / grid.sequence_ranks)


def _norm(width: float, rows: float, precision: Precision) -> float:
    """Per token, a norm of `width` numbers in `rows` rows: its fp32 input, the scale, and in full fine-tuning the
    normalised input for the weight's gradient. Transformer Engine keeps the input as it is."""
    if precision.implementation == "te":
        return precision.element * width + 4 * rows
    return 4 * width + 4 * rows + (0 if precision.lora_rank else precision.element * width)


def _linear_input(width: float, tokens: float, precision: Precision) -> float:
    """What a linear keeps for its weight's gradient, or its adapter's; dropout keeps a mask beside it."""
    if precision.fp8:
        return (1 + (precision.element if precision.lora_rank else 0)) * width * tokens
    mask = 0
    if precision.lora_rank and precision.lora_dropout:
        mask = precision.element if precision.implementation == "cpu" else 1
    return (precision.element + mask) * width * tokens


def _adapter(grid: Grid, t: float, precision: Precision) -> float:
    """One adapter's A x."""
    return precision.lora_rank * precision.element * t


def _attention(shape: ModelShape, grid: Grid, stream: Stream, precision: Precision) -> float:
    """Queries, keys, values, result and its log-sum-exp, and the input of the output projection."""
    a, t, q, kv = precision.element, stream.tokens / grid.cp, shape.query_size / grid.tp, shape.kv_size / grid.tp
    kv = max(kv, shape.head_dim)  # a rank has a whole group, if ranks are more than groups
    sums = 4 * shape.num_heads / grid.tp
    if "core_attn" in precision.recomputed:
        return a * (q + 2 * kv) * t + _linear_input(q, t, precision)
    if precision.implementation == "cpu":
        places = (stream.places or stream.tokens) / grid.cp
        indices_and_mask = 2 * 8 + 1
        return (a * (2 * q + 2 * kv) + sums + indices_and_mask) * places + _linear_input(q, t, precision)
    if precision.implementation == "te":
        kept = (a * (2 * q + 2 * kv) + sums) * t
    else:  # keys and values repeated for each head, from all ranks that share the sequence
        keys = t if grid.cp == 1 else stream.tokens * (1 + 1 / (2 * grid.cp))
        kept = a * (2 * q * t + 2 * q * keys) + sums * t
    # The projection's input is the result itself, unless dropout makes another.
    return kept + (_linear_input(q, t, precision) if precision.lora_rank and precision.lora_dropout else 0)


def _experts(shape: ModelShape, experts: Experts, grid: Grid, n: float, precision: Precision) -> float:
    """Router, the tokens that a rank's experts get, and the experts' feed-forward, if all ranks get as many."""
    a, k, h = precision.element, experts.top_k, shape.hidden_size
    scores = experts.num_experts * (1 + a) + k * (2 * 8 + 8 + 4)  # map and probabilities; indices, scores
    routed = k * n * (1 if grid.sequence_parallel else 1 / grid.tp) * grid.etp  # token-expert pairs of this rank
    # gate|up, and what SwiGLU makes of them, times the router's weight
    return (h * a + scores) * n + routed * (h * a + 3 * experts.ffn_hidden_size * a / grid.etp)


def _ffn_width(shape: ModelShape, layer: int, grid: Grid) -> float:
    """Columns of a layer's feed-forward on one rank, for each token of its slice."""
    if shape.experts is not None and shape.is_sparse(layer):
        return shape.experts.top_k * shape.experts.ffn_hidden_size / grid.tp
    return shape.ffn_hidden_size / grid.tp
