"""A Qwen3 decoder in plain torch and the distillation loss behind it: what `run_megatron.py` compares the trainer with.

Shares nothing with the trainer: no packing, no fused projections, no Megatron, no kernels. Written from the
architecture: pre-norm blocks, RMS norms (of queries and keys too), rotary positions on halves, grouped queries, gated
SiLU, top-k experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_trd.records import Sample

Weights = dict[str, Tensor]
EPS, THETA = 1e-6, 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model; feed-forwards are experts where `experts` is not 0."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    top_k: int = 2

    def sparse(self) -> Shape:
        """The same with eight experts, two of them for each token."""
        return replace(self, experts=8, ffn=self.ffn // 2)

    def config(self) -> dict[str, Any]:
        """As `config.json`."""
        dense = {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": EPS,
            "rope_theta": THETA,
            "tie_word_embeddings": False,
        }
        sparse = {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return dense | sparse if self.experts else dense


def write_model(path: Path, shape: Shape, seed: int) -> Path:
    """Write random weights, peaked enough that errors show, with bf16 values: both precisions start from the same."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale / columns**0.5).bfloat16()

    def norm(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=generator)).bfloat16()

    h, d = shape.hidden, shape.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(shape.vocab, h, h**0.5),
        "model.norm.weight": norm(h),
        "lm_head.weight": matrix(shape.vocab, h, 2.0),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        attention = {"q": (shape.heads * d, h), "k": (shape.kv_heads * d, h), "v": (shape.kv_heads * d, h)}
        attention["o"] = h, shape.heads * d
        weights |= {f"{at}self_attn.{name}_proj.weight": matrix(*size) for name, size in attention.items()}
        weights |= {f"{at}self_attn.{name}_norm.weight": norm(d) for name in "qk"}
        weights |= {f"{at}{name}_layernorm.weight": norm(h) for name in ("input", "post_attention")}
        if shape.experts:
            weights[f"{at}mlp.gate.weight"] = matrix(shape.experts, h, 4.0)
        for place in [f"{at}mlp.experts.{e}." for e in range(shape.experts)] or [f"{at}mlp."]:
            weights |= {f"{place}{name}_proj.weight": matrix(shape.ffn, h) for name in ("gate", "up")}
            weights[f"{place}down_proj.weight"] = matrix(h, shape.ffn)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(shape.config()))
    return path


def read_weights(path: Path, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read what `write_model` wrote."""
    return {name: tensor.to(device, dtype) for name, tensor in load_file(path / "model.safetensors").items()}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise the last dimension, in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to [heads, tokens, head_dim]."""
    half = x.size(-1) // 2
    frequency = THETA ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(x.size(1), device=x.device, dtype=torch.float64)[:, None] * frequency
    cos, sin = (f(angle).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def feed_forward(w: Weights, at: str, x: Tensor) -> Tensor:
    """Gated SiLU."""
    gate, up = x @ w[f"{at}gate_proj.weight"].T, x @ w[f"{at}up_proj.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ w[f"{at}down_proj.weight"].T


def experts(w: Weights, shape: Shape, at: str, x: Tensor) -> Tensor:
    """Top-k experts with weights that sum to one."""
    logits = x @ w[f"{at}gate.weight"].T
    shares, chosen = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).topk(shape.top_k, -1)
    shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
    share = torch.zeros_like(logits).scatter(-1, chosen, shares)
    return sum(share[:, e, None] * feed_forward(w, f"{at}experts.{e}.", x) for e in range(shape.experts))


def logits(w: Weights, shape: Shape, ids: Tensor) -> Tensor:
    """Return [tokens, vocabulary] of one sequence."""
    x, tokens = w["model.embed_tokens.weight"][ids], len(ids)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        h = rms_norm(x, w[f"{at}input_layernorm.weight"])

        def heads(name: str, number: int, h: Tensor = h, at: str = at) -> Tensor:
            y = (h @ w[f"{at}self_attn.{name}_proj.weight"].T).view(tokens, number, shape.head_dim)
            return (y if name == "v" else rms_norm(y, w[f"{at}self_attn.{name}_norm.weight"])).transpose(0, 1)

        q, k, v = rotate(heads("q", shape.heads)), rotate(heads("k", shape.kv_heads)), heads("v", shape.kv_heads)
        k, v = (y.repeat_interleave(shape.heads // shape.kv_heads, 0) for y in (k, v))
        scores = (q @ k.transpose(1, 2) * shape.head_dim**-0.5).masked_fill(mask, -torch.inf)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
        mixed = (scores @ v).transpose(0, 1).reshape(tokens, -1)
        x = x + mixed @ w[f"{at}self_attn.o_proj.weight"].T
        h = rms_norm(x, w[f"{at}post_attention_layernorm.weight"])
        x = x + (experts(w, shape, f"{at}mlp.", h) if shape.experts else feed_forward(w, f"{at}mlp.", h))
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def adapted(base: Weights, adapter: Weights, scale: float) -> Weights:
    """Return base + scale B A; projections that are fused in one linear share A."""
    weights = dict(base)
    for name in [name for name in adapter if name.endswith("lora_B.weight")]:
        a = name.replace("lora_B", "lora_A")
        for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            a = a.replace(other, first)
        target = name.removeprefix("base_model.model.").replace(".lora_B", "")
        weights[target] = base[target] + scale * adapter[name] @ adapter[a]
    return weights


def reference(
    student: Path,
    teacher: Path,
    shapes: tuple[Shape, Shape],
    samples: Sequence[Sample],
    dtype: torch.dtype,
    device: torch.device,
    adapter: tuple[Weights, float] | None = None,
) -> tuple[float, Weights]:
    """Return the loss (forward KL, mean over sequences of the token mean) and the gradients, all in `dtype`.

    Args:
        shapes: of student and teacher.
        adapter: under PEFT's names, with its scale: train it alone.
    """
    base, fixed = read_weights(student, dtype, device), read_weights(teacher, dtype, device)
    leaves = {n: t.to(device, dtype).clone().requires_grad_() for n, t in (adapter[0] if adapter else base).items()}
    total = 0.0
    for sample in samples:
        weights = adapted(base, leaves, adapter[1]) if adapter else leaves
        log_q, log_p = (
            logits(w, shape, torch.tensor(prompt + sample.response_ids, device=device))[len(prompt) - 1 : -1]
            .to(torch.promote_types(dtype, torch.float32))
            .log_softmax(-1)
            for w, shape, prompt in (
                (weights, shapes[0], sample.student_prompt_ids),
                (fixed, shapes[1], sample.teacher_prompt_ids),
            )
        )
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean() / len(samples)
        loss.backward()
        total += loss.item()
    return total, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
