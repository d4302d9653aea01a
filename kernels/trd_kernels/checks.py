"""Argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

_NOT_SUPPORTED = {
    "bias": "logits are products of hidden states and head rows; a head with a bias would be trained wrongly",
    "logit_scale": "fold the scale into the head's rows or the hidden states; `temperature` divides both sides",
    "logit_softcap": "the gradient through the cap is not implemented, and without it training would be wrong",
}


def require(ok: bool, argument: str, value: object, reason: str) -> None:
    """Raise a ValueError that names the argument, its value and what is wrong with it, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument} {value}: {reason}")


def refuse_head_options(**options: object) -> None:
    """Refuse what heads of other models have and this operator lacks, rather than ignore it."""
    for name, value in options.items():
        require(value is None, name, value, f"not supported: {_NOT_SUPPORTED[name]}")


def check_heads(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor) -> None:
    """Check shapes, dtypes and devices of the four tensors, and that the teacher is a constant."""
    tensors = {
        "student_input": student_input,
        "student_weight": student_weight,
        "teacher_input": teacher_input,
        "teacher_weight": teacher_weight,
    }
    for name, x in tensors.items():
        require(x.ndim == 2, name, tuple(x.shape), "must have two dimensions")
        require(
            x.dtype in (torch.float64, torch.float32, torch.bfloat16),
            name,
            x.dtype,
            "must be float64, float32 or bfloat16 (float16 has too little range for unscaled gradients)",
        )
        require(
            x.dtype == student_input.dtype, name, x.dtype, f"must be the dtype of student_input, {student_input.dtype}"
        )
        require(
            x.device == student_input.device, name, x.device, f"must be on {student_input.device}, as student_input"
        )
    for side, x, weight in (("student", student_input, student_weight), ("teacher", teacher_input, teacher_weight)):
        require(
            weight.shape[1] == x.shape[1],
            f"{side}_weight",
            tuple(weight.shape),
            f"must have the {x.shape[1]} columns of {side}_input",
        )
    require(
        teacher_input.shape[0] == student_input.shape[0],
        "teacher_input",
        tuple(teacher_input.shape),
        f"must have the {student_input.shape[0]} rows of student_input",
    )
    require(
        teacher_weight.shape[0] == student_weight.shape[0],
        "teacher_weight",
        tuple(teacher_weight.shape),
        f"must hold the {student_weight.shape[0]} vocabulary rows of student_weight: load it in the student's ranges",
    )
    _check_constants(teacher_input=teacher_input, teacher_weight=teacher_weight)


def check_tokens(token_weight: Tensor | None, labels: Tensor | None, num_tokens: int, device: torch.device) -> None:
    """Check what is given per token, `[N]` on every rank."""
    for name, x in (("token_weight", token_weight), ("labels", labels)):
        if x is None:
            continue
        require(
            x.shape == (num_tokens,),
            name,
            tuple(x.shape),
            f"must be ({num_tokens},), one entry per token of all sequence shards",
        )
        require(x.device == device, name, x.device, f"must be on {device}, as student_input")
    if token_weight is not None:
        require(token_weight.is_floating_point(), "token_weight", token_weight.dtype, "must be floating point")
        _check_constants(token_weight=token_weight)
    if labels is not None:
        require(labels.dtype == torch.int64, "labels", labels.dtype, "must be int64")


def check_weight_out(out: Tensor | None, factor: float | None, student_weight: Tensor, dtype: torch.dtype) -> None:
    """Check where the gradient of the head shall be added; `dtype` is that of the operator's inputs."""
    if out is None:
        require(factor is None, "grad_weight_factor", factor, "needs grad_weight_out, which it lets chunks add to")
        return
    name = "grad_weight_out"
    if torch.is_grad_enabled():
        require(student_weight.requires_grad, name, tuple(out.shape), "student_weight is frozen: nothing to add")
    require(out.shape == student_weight.shape, name, tuple(out.shape), f"must be {tuple(student_weight.shape)}")
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    require(out.dtype == accumulation, name, out.dtype, f"must be {accumulation}, the dtype of the accumulation")
    require(out.device == student_weight.device, name, out.device, f"must be on {student_weight.device}")


def _check_constants(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        require(not needs_grad, name, "that requires grad", "it is a constant; pass it through .detach()")
