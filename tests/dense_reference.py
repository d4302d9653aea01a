"""An fp64 reference of the whole objective on transformers.

It shares nothing with the product: no packing, no chunks, no Megatron; plain autograd through `log_softmax`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_trd.config.schema import LoraConfig, ObjectiveConfig
from megatron_trd.records import Sample


def dense_logits(weights: dict[str, torch.Tensor], path: Path, prompt: tuple[int, ...], response: tuple[int, ...]):
    """Logits that predict each response token, from transformers in fp64 with the given weights."""
    from transformers import AutoModelForCausalLM

    if path not in dense_logits.models:
        dense_logits.models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    model = dense_logits.models[path]
    output = torch.func.functional_call(model, weights, (torch.tensor([prompt + response]),))
    return output.logits[0, len(prompt) - 1 : -1]


dense_logits.models = {}


def dense_divergence(objective: ObjectiveConfig, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Per-token divergence, written from the definitions."""
    if objective.teacher_top_k:
        chosen = teacher.topk(objective.teacher_top_k, -1).indices
        student, teacher = student.gather(-1, chosen), teacher.gather(-1, chosen)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if objective.divergence == "reverse-kl":
        return (q * (log_q - log_p)).sum(-1)
    if objective.divergence == "jsd":
        log_m = (objective.beta * p + (1 - objective.beta) * q).log()
        return (objective.beta * p * (log_p - log_m) + (1 - objective.beta) * q * (log_q - log_m)).sum(-1)
    entries = p * (log_p - log_q)
    if objective.entry_clip is not None:
        entries = entries.clamp(max=objective.entry_clip)
    values = entries.sum(-1)
    return values.clamp(max=objective.token_clip) if objective.token_clip is not None else values


def dense_reference(
    objective: ObjectiveConfig,
    samples: Sequence[Sample],
    student_path: Path,
    teacher_path: Path,
    adapter: dict[str, torch.Tensor] | None = None,
    lora: LoraConfig | None = None,
    student_weights: dict[str, torch.Tensor] | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients, named as Hugging Face (or PEFT, with an adapter) names them."""
    base = student_weights or {k: v.double() for k, v in load_file(student_path / "model.safetensors").items()}
    teacher = {k: v.double() for k, v in load_file(teacher_path / "model.safetensors").items()}
    if adapter is None:
        leaves = {k: v.clone().requires_grad_() for k, v in base.items()}
        weights = dict(leaves)
    else:
        leaves = {k: v.double().clone().requires_grad_() for k, v in adapter.items()}
        for family in ("k_proj", "v_proj"):  # projections fused in one linear share their A
            leaves.update({k: leaves[k.replace(family, "q_proj")] for k in leaves if f"{family}.lora_A" in k})
        leaves.update({k: leaves[k.replace("up_proj", "gate_proj")] for k in leaves if "up_proj.lora_A" in k})
        weights = dict(base)
        for name in leaves:
            if name.endswith("lora_A.weight"):
                b = leaves[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                weights[target] = base[target] + lora.lora_alpha / lora.lora_rank * b @ leaves[name]
    if "lm_head.weight" not in base:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    num_tokens = sum(len(s.response_ids) for s in samples)
    loss = torch.zeros((), dtype=torch.float64)
    for s in samples:
        q = dense_logits(weights, student_path, s.student_prompt_ids, s.response_ids)
        with torch.no_grad():
            p = dense_logits(teacher, teacher_path, s.teacher_prompt_ids, s.response_ids)
        values = dense_divergence(objective, q, p)
        loss = loss + (
            values.mean() / len(samples) if objective.loss_normalization == "sequence" else values.sum() / num_tokens
        )
    loss.backward()
    return loss.item(), {k: v.grad for k, v in leaves.items()}
