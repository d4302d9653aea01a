"""Floating-point operations: two for each multiplication of a matrix product; nothing else is counted.

A sequence of L tokens meets every matrix product of a layer L times: 2 L parameters. Causal attention takes half of
two products [L, D] x [D, L] a head: 2 L^2 x width of all queries. A backward pass takes as much again for the inputs,
and as much again for the weights that learn; flash attention's takes five products to the forward pass's two.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.planning.model_shape import ModelShape, attention_linears, feed_forward_linears

FLASH_BACKWARD = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Of matrix products with weights, and of attention's own."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def times(self, factor: float) -> Flops:
        """Return as many passes."""
        return Flops(linear=self.linear * factor, attention=self.attention * factor)

    @property
    def total(self) -> float:
        """Both together."""
        return self.linear + self.attention


def layer_forward(shape: ModelShape, layer: int, *, tokens: float, mean_length: float, causal: bool = True) -> Flops:
    """Count one layer's forward pass over `tokens` tokens in sequences of `mean_length`."""
    scores = 4 * shape.query_size * mean_length * tokens
    return Flops(linear=2 * layer_products(shape, layer) * tokens, attention=scores / 2 if causal else scores)


def layer_products(shape: ModelShape, layer: int) -> int:
    """Count the weights of a layer that one token is multiplied with."""
    attention = sum(out * inside for out, inside in attention_linears(shape))
    ffn, router = shape.ffn_hidden_size, 0
    if shape.experts is not None and shape.is_sparse(layer):
        ffn = shape.experts.top_k * shape.experts.ffn_hidden_size
        router = shape.experts.num_experts * shape.hidden_size
    return attention + router + sum(out * inside for out, inside in feed_forward_linears(shape, ffn))


def adapter_products(shape: ModelShape, layer: int, rank: int) -> int:
    """Count the adapter's numbers that one token is multiplied with: A and B of each fused linear."""
    linears = list(attention_linears(shape))
    if not shape.is_sparse(layer):
        linears += feed_forward_linears(shape, shape.ffn_hidden_size)
    return sum(rank * (out + inside) for out, inside in linears)


def layer_training(
    shape: ModelShape,
    layer: int,
    *,
    tokens: float,
    mean_length: float,
    lora_rank: int = 0,
    recomputed: bool = False,
    causal: bool = True,
) -> Flops:
    """Count one layer's forward and backward pass; a frozen base has no weight gradients."""
    forward = layer_forward(shape, layer, tokens=tokens, mean_length=mean_length, causal=causal)
    adapter = 2 * adapter_products(shape, layer, lora_rank) * tokens if lora_rank else 0.0
    backward = Flops(
        linear=forward.linear * (1 if lora_rank else 2) + 2 * adapter, attention=forward.attention * FLASH_BACKWARD
    )
    forward = forward + Flops(linear=adapter)
    return forward + backward + (forward if recomputed else Flops())


def loss_heads(student: ModelShape, teacher: ModelShape, *, response_tokens: float, head_learns: bool) -> float:
    """Count both heads' logits, the gradient of the student's hidden states, and that of a head that learns."""
    student_head = 2 * student.vocab_size * student.hidden_size
    teacher_head = 2 * teacher.vocab_size * teacher.hidden_size
    return response_tokens * (student_head * (3 if head_learns else 2) + teacher_head)


def generation(shape: ModelShape, *, tokens: float, mean_context: float) -> Flops:
    """Count a server's work on `tokens` tokens that each see `mean_context` others; the head is counted apart."""
    layers = range(shape.num_layers)
    return Flops(
        linear=2 * tokens * sum(layer_products(shape, layer) for layer in layers),
        attention=4 * shape.query_size * mean_context * tokens * shape.num_layers,
    )
