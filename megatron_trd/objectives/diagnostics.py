"""Token-weighted sums behind the method's diagnostics: numerators and denominators, divided once by the reader.

D_correct and D_incorrect split the mean per-token divergence by the stage-1 verdict; the epistemic mass is the
teacher's probability on words such as "Wait"; perplexities are of the response tokens at T = 1
(arXiv 2606.08432, appendix C.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp

import torch
from torch import Tensor

from trd_kernels import LinearKLDivOutput

NAMES = (
    "loss",
    "divergence",
    "divergence_correct",
    "divergence_incorrect",
    "clip_fraction",
    "student_nll",
    "teacher_nll",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",
    "epistemic_mass",
    "expert_imbalance",
)

Sums = dict[str, tuple[Tensor, Tensor]]
"""Name -> (numerator, denominator), fp64 scalars on the device."""


def diagnostic_sums(
    output: LinearKLDivOutput, token_weight_R: Tensor, y_o_correct_R: Tensor, token_clip: float | None
) -> Sums:
    """Sum one micro-batch's tokens. `y_o_correct_R` is 1, 0 or -1 (unknown); the padding rows have zero weight."""
    real = token_weight_R > 0
    values = output.token_loss

    def mean_over(chosen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(chosen, x, 0).double().sum(), chosen.double().sum()

    stats = output.stats
    divergence = stats["divergence"]  # before the clip
    sums = {
        "loss": ((token_weight_R * values).double().sum(), token_weight_R.double().sum()),
        "divergence": mean_over(real, divergence),
        "divergence_correct": mean_over(real & (y_o_correct_R == 1), divergence),
        "divergence_incorrect": mean_over(real & (y_o_correct_R == 0), divergence),
        "student_nll": mean_over(real, -stats["student_logprob"]),
        "teacher_nll": mean_over(real, -stats["teacher_logprob"]),
        "student_entropy": mean_over(real, stats["student_entropy"]),
        "teacher_entropy": mean_over(real, stats["teacher_entropy"]),
        "top1_agreement": mean_over(real, stats["argmax_match"]),
        "epistemic_mass": mean_over(real, stats["teacher_mass"]),
    }
    if token_clip is not None:
        sums["clip_fraction"] = mean_over(real, (values >= token_clip).to(values.dtype))
    return sums


def with_perplexities(means: Mapping[str, float]) -> dict[str, float]:
    """Add both perplexities and their gap PPL_S - PPL_T to the divided sums."""
    result = dict(means)
    for side in ("student", "teacher"):
        if f"{side}_nll" in means:
            result[f"{side}_perplexity"] = exp(means[f"{side}_nll"])
    if {"student_perplexity", "teacher_perplexity"} <= result.keys():
        result["perplexity_gap"] = result["student_perplexity"] - result["teacher_perplexity"]
    return result
