"""From a step and its reference to a verdict on every parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_trd.certificate.training_step import StepTaken
from megatron_trd.config.schema import OptimizerConfig

FACTOR = 2.0
"""An error may be this many times the yardstick's: what transformers loses in the run's precision."""
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Relative error that is never held against a gradient."""
FLOOR_OF_SUMS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The same of the loss: the yardstick may be right about it by chance."""
FLOOR_OF_NORM = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""And of the gradient norm: torch's fp32 norm of a large tensor on a CPU is off by up to 1e-3, and what this finds - a
parameter left out or counted twice - is off by more."""
UPDATE_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error of an update: Adam divides by the root of a square in fp32; bf16 weights round it."""
NEGLIGIBLE = 1e-7
"""Times the largest gradient: below it an error is that of a sum that cancels."""
WORST_YARDSTICK = 0.2
"""A yardstick that is off by more than this measures nothing."""

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One parameter, its gradient or its update, beside the reference's."""

    name: str
    error: float
    """Norm of the difference / norm of the reference, or the former alone where the latter is zero."""
    cosine: float
    scale: float
    """Least-squares factor between the two: 1 where they agree."""
    limit: float
    """Of `error`."""

    @property
    def ok(self) -> bool:
        """Whether it is within its limit; not so a NaN."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The outcome. Every list is sorted, worst first."""

    gradients: tuple[Finding, ...]
    updates: tuple[Finding, ...]
    """Of one optimizer step, beside Adam's in fp64 on the gradients measured here."""
    loss: Finding
    grad_norm: Finding
    unequal_copies: tuple[str, ...]
    yardstick: float
    """Relative error of all gradients together that transformers makes in the run's precision."""

    @property
    def certified(self) -> bool:
        """Whether everything is within its limit and all copies are equal."""
        findings = (*self.gradients, *self.updates, self.loss, self.grad_norm)
        return all(finding.ok for finding in findings) and not self.unequal_copies and self.yardstick_is_good

    @property
    def yardstick_is_good(self) -> bool:
        """Whether the limits mean something."""
        return self.yardstick <= WORST_YARDSTICK


def compare(
    step: StepTaken,
    reference: tuple[float, Gradients],
    yardstick: tuple[float, Gradients],
    optimizer: OptimizerConfig,
    dtype: torch.dtype,
) -> Certificate:
    """Compare a step with the fp64 reference; `yardstick` is the same on transformers in the run's precision.

    Raises:
        ValueError: step and reference speak of different parameters.
    """
    expected_loss, expected = reference
    if expected.keys() != step.gradients.keys():
        names = ", ".join(sorted(expected.keys() ^ step.gradients.keys())[:5])
        raise ValueError(f"parameters {names}: only in the run or only in the reference; the two do not fit")
    overall = _norm(expected)
    noise = _norm({k: yardstick[1][k].double() - g for k, g in expected.items()}) / overall
    floor, largest = FLOOR[dtype], max(g.norm().item() for g in expected.values())

    def gradient(name: str, exact: Tensor) -> Finding:
        size = exact.norm().item()
        lost = (yardstick[1][name].double() - exact).norm().item()
        allowed = FACTOR * max(lost, noise * size) + floor * size + NEGLIGIBLE * largest
        return _finding(name, step.gradients[name], exact, allowed / (size or 1.0))

    exact_norm = _norm(distinct(expected))
    lost = abs(_norm(distinct(yardstick[1])) - exact_norm) / exact_norm
    lost_loss = abs(yardstick[0] - expected_loss) / abs(expected_loss)
    updates = adam_updates(step.before, step.gradients, optimizer)
    return Certificate(
        gradients=_worst_first(gradient(name, exact) for name, exact in expected.items()),
        updates=_worst_first(
            _finding(name, step.after[name].double() - step.before[name].double(), exact, UPDATE_LIMIT[dtype])
            for name, exact in updates.items()
        ),
        loss=_scalar("loss", step.loss, expected_loss, FACTOR * lost_loss + FLOOR_OF_SUMS[dtype]),
        grad_norm=_scalar("gradient norm", step.grad_norm, exact_norm, FACTOR * lost + FLOOR_OF_NORM[dtype]),
        unequal_copies=step.unequal_copies,
        yardstick=noise,
    )


def distinct(tensors: Gradients) -> dict[str, Tensor]:
    """Leave out the repeated A of fused projections, which is one parameter."""
    return {
        k: v for k, v in tensors.items() if "lora_A" not in k or not any(f"{p}_proj" in k for p in ("k", "v", "up"))
    }


def adam_updates(weights: Gradients, grads: Gradients, config: OptimizerConfig) -> dict[str, Tensor]:
    """Return what AdamW's first step adds to each weight, rounded as the weight is; in fp64, on clipped gradients.

    Its moments, corrected for their start, are g and g^2 (Kingma & Ba, arXiv 1412.6980, algorithm 1); decay is apart
    from them and spares vectors (Loshchilov & Hutter, arXiv 1711.05101).
    """
    clip = min(1.0, config.clip_grad / (_norm(distinct(grads)) + 1e-6)) if config.clip_grad else 1.0
    updates = {}
    for name, weight in weights.items():
        exact, g = weight.double(), clip * grads[name].double()
        decay = config.weight_decay if weight.ndim > 1 else 0.0
        after = exact - config.lr * (g / (g.abs() + config.adam_eps) + decay * exact)
        updates[name] = after.to(weight.dtype).double() - exact
    return updates


def _norm(tensors: Gradients) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def _finding(name: str, measured: Tensor, exact: Tensor, limit: float) -> Finding:
    measured = measured.double()
    size, own = exact.norm().item(), measured.norm().item()
    product = (measured * exact).sum().item()
    error = (measured - exact).norm().item()
    if not size:  # an expert that no token chose: error and limit are absolute
        return Finding(name=name, error=own, cosine=math.nan, scale=math.nan, limit=limit)
    return Finding(
        name=name,
        error=error / size,
        cosine=product / (size * own) if own else 0.0,
        scale=product / size**2,
        limit=limit,
    )


def _scalar(name: str, measured: float, exact: float, limit: float) -> Finding:
    return Finding(
        name=name,
        error=abs(measured - exact) / abs(exact),
        cosine=math.copysign(1.0, measured * exact),
        scale=measured / exact,
        limit=limit,
    )


def _worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    def badness(finding: Finding) -> float:
        if math.isnan(finding.error):
            return math.inf
        return finding.error / finding.limit

    return tuple(sorted(findings, key=badness, reverse=True))
