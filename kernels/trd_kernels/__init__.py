"""Fused losses for distillation over a sharded vocabulary. Needs torch alone."""

from __future__ import annotations

from trd_kernels.linear_divergence import LinearKLDivLoss, linear_kl_div
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.reference import linear_kl_div_reference
from trd_kernels.statistics_request import STATISTICS
from trd_kernels.workspace import DEFAULT_WORKSPACE_MB

__all__ = [
    "DEFAULT_WORKSPACE_MB",
    "STATISTICS",
    "LinearKLDivLoss",
    "LinearKLDivOutput",
    "linear_kl_div",
    "linear_kl_div_reference",
]
