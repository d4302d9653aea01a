"""From a run's files to plain numbers: all that the page shows. What the files do not hold is absent, never zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_trd.benchmarks.summary import matrices
from megatron_trd.estimators import (
    Interval,
    Matrix,
    averages,
    bootstrap_interval,
    curve_points,
    known_values,
    passes,
    wilson_interval,
)
from megatron_trd.reporting.audit_numbers import audit_numbers
from megatron_trd.reporting.responses import (
    OUTCOMES,
    PASS_BUCKETS,
    by_difficulty,
    describe_outcomes,
    lengths,
    outcome_counts,
    outline,
    pass_bucket,
)
from megatron_trd.reporting.run_files import RunFiles

Series = Sequence[tuple[float, float]]


def numbers_of(run: RunFiles, count_tokens: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Return everything the run's files say, as JSON holds it.

    Args:
        count_tokens: measures y*, which trajectories hold as text; None = its lengths are left out.

    Raises:
        ValueError: a file is malformed.
    """
    outlines = [outline(trajectory, count_tokens) for trajectory in run.read_trajectories()]
    counts = _outcomes_of_metrics(run.metrics) or outcome_counts(outlines)
    found = {
        "summary": {key: value for key, value in run.summary.items() if key not in ("before", "after")},
        "series": series_of(run.metrics),
        "pass_by_iteration": _pass_by_iteration(run.metrics),
        "scores": _scores(run),
        "improvement": _improvement(run.summary),
        "outcomes": describe_outcomes(counts) if counts else {},
        "lengths": lengths(outlines),
        "difficulty": by_difficulty(outlines),
        "audit": audit_numbers(run.audits),
    }
    return {"name": run.name, **{key: value for key, value in found.items() if value}}


def series_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Return tag -> (iteration, value) of the iterations that have it."""
    tags = dict.fromkeys(tag for line in metrics for tag in line if "/" in tag)
    return {tag: [(line["iteration"], line[tag]) for line in metrics if tag in line] for tag in tags}


def _outcomes_of_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, int]:
    tables = [table for line in metrics if (table := _outcome_table(line))]
    return {name: sum(table[name] for table in tables) for name in OUTCOMES} if tables else {}


def _outcome_table(line: Mapping[str, float]) -> dict[str, int]:
    found = {name: int(line[f"rollout/{name}"]) for name in OUTCOMES if f"rollout/{name}" in line}
    return found if sum(found.values()) else {}


def _pass_by_iteration(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[dict[str, Any]]]:
    """Return both pass rates of each iteration, over the trajectories whose two responses are graded."""
    tables = [(line["iteration"], describe_outcomes(table)) for line in metrics if (table := _outcome_table(line))]
    if not tables:
        return {}
    return {
        which: [{"iteration": iteration, "n": table["n"], **table[which]} for iteration, table in tables]
        for which in ("y_o", "y_r")
    }


def _scores(run: RunFiles) -> list[dict[str, Any]]:
    """Return one curve for each evaluation: before and after training, and each benchmark of other directories."""
    found = [
        {"set": "held-out problems of the training task", "moment": moment, **score(run.summary[moment]["correct"])}
        for moment in ("before", "after")
        if run.summary.get(moment)
    ]
    for directory in run.evaluations:
        for bench, verdicts in matrices(directory).items():
            moment = "" if directory == run.path else directory.name
            found.append({"set": bench, "moment": moment, **score([*verdicts.values()])})
    return [entry for entry in found if entry["curve"]]


def score(correct: Matrix) -> dict[str, Any]:
    """Return the unbiased pass@k curve of a matrix of verdicts with 95 % intervals over problems."""
    k = max(map(len, correct), default=0)
    curve = []
    for j in curve_points(k) if k else ():
        if values := known_values(passes(correct, j)):
            curve.append({"k": j, "pass": float(np.mean(values)), "interval": list(_interval(values, k))})
    return {"problems": len(correct), "samples": k, "curve": curve}


def _interval(values: Sequence[float], samples: int) -> Interval:
    return wilson_interval(round(sum(values)), len(values)) if samples == 1 else bootstrap_interval(values)


def _improvement(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return avg@k before and after by difficulty.

    The first half of each problem's samples before training chooses its bucket, the second half is its score: the same
    samples for both would show easier problems getting worse and harder ones better, by chance alone.
    """
    before, after = summary.get("before"), summary.get("after")
    if not before or not after or before["problem_ids"] != after["problem_ids"]:
        return []
    half = max(map(len, before["correct"])) // 2
    chosen = averages([row[:half] for row in before["correct"]])
    scored = averages([row[half:] for row in before["correct"]])
    rows = [
        (pass_bucket(rate), was, became)
        for rate, was, became in zip(chosen, scored, averages(after["correct"]), strict=True)
        if rate is not None and was is not None and became is not None
    ]
    found = []
    for name in PASS_BUCKETS:
        pairs = [(was, became) for bucket, was, became in rows if bucket == name]
        if pairs:
            columns = {"before": [was for was, _ in pairs], "after": [became for _, became in pairs]}
            rates = {
                moment: {"pass": float(np.mean(values)), "interval": list(bootstrap_interval(values))}
                for moment, values in columns.items()
            }
            found.append({"bucket": name, "problems": len(pairs), **rates})
    return found
