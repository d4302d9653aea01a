"""How old the weights are that a batch was sampled from, in iterations.

The weights after i iterations are version i. Iteration i (from 0) trains version i on batch i, so a token of batch i
that version v sampled is i - v iterations behind; strictly on-policy it is 0. What counts is the oldest token of what
the student wrote: y_o, and y_r where the student refines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_trd.records import Completion, Trajectory

_VERSION = re.compile(r"iter_(\d+)")


def weight_version(iteration: int) -> str:
    """Return the name that servers know the weights after `iteration` iterations by."""
    return f"iter_{iteration:07d}"


def iteration_of(version: str | None) -> int | None:
    """Return the iteration that made a version; None if no trainer named it."""
    match = _VERSION.fullmatch(version or "")
    return int(match[1]) if match else None


def behind(completions: Iterable[Completion | None], iteration: int) -> int | None:
    """Return how far the oldest token is behind the weights of `iteration`; None if a version is unknown."""
    versions = [version for c in completions if c is not None for version in c.weight_versions]
    made = [iteration_of(version) for version in versions]
    known = [number for number in made if number is not None]
    return iteration - min(known) if known and len(known) == len(made) else None


def staleness_metrics(trajectories: Iterable[Trajectory], iteration: int, student_refines: bool) -> dict[str, float]:
    """Return mean and maximum over the trajectories of a batch; nothing where versions are unknown."""
    ages = [behind((t.y_o, t.y_r if student_refines else None), iteration) for t in trajectories]
    known = [age for age in ages if age is not None]
    if not known:
        return {}
    return {"rollout/staleness_mean": sum(known) / len(known), "rollout/staleness_max": float(max(known))}
