"""The whole objective on transformers, by default in fp64.

It shares nothing with training: no packing, no chunks, no Megatron, no kernels; plain autograd through `log_softmax`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_trd.config.schema import LoraConfig, ObjectiveConfig
from megatron_trd.records import Sample

Weights = dict[str, Tensor]


@cache
def _model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()


def dense_logits(
    weights: Weights,
    path: Path,
    prompt: tuple[int, ...],
    response: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the logits that predict each response token, [R, vocabulary], from transformers in `dtype`.

    Args:
        weights: under the names of a checkpoint, in place of those in `path`.
    """
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    tokens = torch.tensor([prompt + response])
    # Not tied: embedding and head, where they are one tensor, are given as two casts of it.
    output = torch.func.functional_call(_model(path, dtype), stacked_experts(cast), (tokens,), tie_weights=False)
    return output.logits[0, len(prompt) - 1 : -1]


def stacked_experts(weights: Weights) -> Weights:
    """Stack the matrices of experts, which are apart in a checkpoint, as transformers' modules hold them."""
    stacked = dict(weights)
    for first in [name for name in weights if name.endswith(".experts.0.gate_proj.weight")]:
        experts = first.removesuffix("0.gate_proj.weight")
        parts: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
        while f"{experts}{len(parts['gate_proj'])}.gate_proj.weight" in stacked:
            number = len(parts["gate_proj"])
            for name, tensors in parts.items():
                tensors.append(stacked.pop(f"{experts}{number}.{name}.weight"))
        gate, up, down = map(torch.stack, parts.values())
        stacked |= {f"{experts}gate_up_proj": torch.cat([gate, up], 1), f"{experts}down_proj": down}
    return stacked


def dense_divergence(objective: ObjectiveConfig, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of each token, [R], from logits [R, vocabulary], by the definitions of docs/method.md."""
    log_q = (student / objective.distill_temperature).log_softmax(-1)
    log_p = (teacher / objective.distill_temperature).log_softmax(-1)
    if objective.teacher_top_k:
        log_p, log_q = _on_support(objective, log_p, log_q)
    p, q = log_p.exp(), log_q.exp()
    match objective.divergence:
        case "reverse-kl":
            values = (q * (log_q - log_p)).sum(-1)
        case "jsd":
            log_m = (objective.beta * p + (1 - objective.beta) * q).log()
            values = (objective.beta * p * (log_p - log_m) + (1 - objective.beta) * q * (log_q - log_m)).sum(-1)
        case "mixed":
            values = (objective.beta * p * (log_p - log_q) + (1 - objective.beta) * q * (log_q - log_p)).sum(-1)
        case "forward-kl":
            entries = p * (log_p - log_q)
            if objective.entry_clip is not None:
                entries = entries.clamp(max=objective.entry_clip)
            values = entries.sum(-1)
    return values.clamp(max=objective.token_clip) if objective.token_clip is not None else values


def _on_support(objective: ObjectiveConfig, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    chosen = log_p.topk(min(objective.teacher_top_k, log_p.size(-1)), -1).indices
    inside_p, inside_q = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    if objective.top_k_mode == "renorm_both":
        return inside_p.log_softmax(-1), inside_q.log_softmax(-1)
    if objective.top_k_mode == "renorm_teacher":  # what is outside has p = 0, and adds nothing
        return inside_p.log_softmax(-1), inside_q
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, chosen, False)
    if not outside.any():
        return inside_p, inside_q
    tails = (x.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_p, log_q))
    tail_p, tail_q = tails
    return torch.cat([inside_p, tail_p], -1), torch.cat([inside_q, tail_q], -1)


def dense_reference(
    objective: ObjectiveConfig,
    samples: Sequence[Sample],
    student_path: Path,
    teacher_path: Path,
    adapter: Weights | None = None,
    lora: LoraConfig | None = None,
    student_weights: Weights | None = None,
    *,
    teacher_is_student: bool = False,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, Weights]:
    """Return the loss and the fp64 gradients, named as Hugging Face (or PEFT, with an adapter) names them.

    Args:
        adapter: train it, under PEFT's names, in place of the weights.
        student_weights: in place of those in `student_path`.
        teacher_is_student: the teacher has the student's adapter too.
        vocab_size: columns that student and teacher both have; None = all.
        dtype: of weights and activations in the models; the divergence is taken in at least fp32, and the
            gradients of samples are summed in fp64.
    """
    base = student_weights or {k: v.double() for k, v in load_file(student_path / "model.safetensors").items()}
    teacher = _with_head({k: v.double() for k, v in load_file(teacher_path / "model.safetensors").items()})
    leaves = {k: v.detach().double().clone().requires_grad_() for k, v in (adapter or base).items()}
    if adapter is not None:
        _share_fused(leaves)
    num_tokens = sum(len(s.response_ids) for s in samples)
    total = 0.0
    for s in samples:
        weights = _with_head(dict(leaves) if lora is None or adapter is None else _adapted(base, leaves, lora))
        q = dense_logits(weights, student_path, s.student_prompt_ids, s.response_ids, dtype)
        with torch.no_grad():
            theirs = weights if teacher_is_student else teacher
            p = dense_logits(theirs, teacher_path, s.teacher_prompt_ids, s.response_ids, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        values = dense_divergence(objective, q[:, :vocab_size].to(wide), p[:, :vocab_size].to(wide))
        by_sequence = objective.loss_normalization == "sequence"
        loss = values.mean() / len(samples) if by_sequence else values.sum() / num_tokens
        loss.backward()
        total += loss.item()
    return total, {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


def _with_head(weights: Weights) -> Weights:
    return {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}


def _share_fused(leaves: Weights) -> None:
    """Projections fused in one linear share their A."""
    for name in [name for name in leaves if "lora_A" in name]:
        for fused, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            if fused in name:
                leaves[name] = leaves[name.replace(fused, first)]


def _adapted(base: Mapping[str, Tensor], leaves: Weights, lora: LoraConfig) -> Weights:
    weights = dict(base)
    for name in leaves:
        if name.endswith("lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            product = leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
            weights[target] = base[target] + lora.lora_alpha / lora.lora_rank * product
    return weights
