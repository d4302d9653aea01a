"""What trajectories say: outcomes of both stages, lengths by verdict, pass rates by difficulty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_trd.estimators import bootstrap_interval, wilson_interval
from megatron_trd.records import Completion, Trajectory

OUTCOMES = ("pass_pass", "pass_fail", "fail_pass", "fail_fail")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_BUCKETS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A trajectory without its text."""

    problem_id: str
    difficulty: Any
    """From the problem's metadata."""
    tokens: Mapping[str, int]
    """Of y*, y_o and y_r, where there are any."""
    y_o: bool | None
    """Whether y_o is right; None: nobody knows."""
    y_r: bool | None


def outline(trajectory: Trajectory, count_tokens: Callable[[str], int] | None) -> Outline:
    """Keep what the numbers need; `count_tokens` measures y*, which a trajectory holds as text."""
    reference = trajectory.problem.reference_solution
    lengths = {
        "y*": count_tokens(reference) if reference is not None and count_tokens is not None else None,
        "y_o": _length(trajectory.y_o),
        "y_r": _length(trajectory.y_r),
    }
    return Outline(
        problem_id=trajectory.problem.id,
        difficulty=trajectory.problem.metadata.get("difficulty"),
        tokens={which: length for which, length in lengths.items() if length is not None},
        y_o=trajectory.y_o_correct,
        y_r=trajectory.y_r_correct,
    )


def _length(completion: Completion | None) -> int | None:
    return None if completion is None or completion.finish_reason == "abort" else len(completion.token_ids)


def lengths(outlines: Sequence[Outline]) -> list[dict[str, Any]]:
    """Return quantiles of the lengths in tokens: y* and y_o by the verdict on y_o, y_r by its own."""
    found = []
    for which in ("y*", "y_o", "y_r"):
        for passed, verdict in ((True, "right"), (False, "not right")):
            values = [
                o.tokens[which]
                for o in outlines
                if which in o.tokens and (o.y_r if which == "y_r" else o.y_o) is passed
            ]
            if values:
                quantiles = [float(value) for value in np.quantile(values, QUANTILES)]
                found.append({"response": which, "verdict": verdict, "n": len(values), "quantiles": quantiles})
    return found


def outcome_counts(outlines: Iterable[Outline]) -> dict[str, int]:
    """Count the 2x2 outcomes of the trajectories whose two responses are graded."""
    pairs = [(o.y_o, o.y_r) for o in outlines if o.y_o is not None and o.y_r is not None]
    names = {True: "pass", False: "fail"}
    return {f"{names[a]}_{names[b]}": pairs.count((a, b)) for a in names for b in names} if pairs else {}


def describe_outcomes(counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the counts with pass rates and the ratio of fail -> pass to pass -> fail, with 95 % intervals.

    The ratio's interval is that of the share of fail -> pass among both (Wilson), as odds; its upper end is None where
    it is infinite, and the ratio itself without a pass -> fail.
    """
    num = sum(counts.values())
    found: dict[str, Any] = {"counts": dict(counts), "n": num}
    for which, right in (("y_o", ("pass_pass", "pass_fail")), ("y_r", ("pass_pass", "fail_pass"))):
        num_right = sum(counts[name] for name in right)
        found[which] = {"pass": num_right / num, "interval": list(wilson_interval(num_right, num))}
    up, down = counts["fail_pass"], counts["pass_fail"]
    if up + down:
        low, high = (_odds(share) for share in wilson_interval(up, up + down))
        found["ratio"] = {"value": up / down if down else None, "interval": [low, high]}
    return found


def _odds(share: float) -> float | None:
    return None if math.isclose(share, 1.0) else share / (1 - share)


def by_difficulty(outlines: Sequence[Outline]) -> dict[str, Any]:
    """Return both pass rates in buckets of difficulty: the corpus' own, or how often y_o of a problem passes.

    The second kind needs several trajectories of a problem: the first half of them chooses its bucket, the others are
    its score. The same verdicts for both would spread the buckets by luck alone.
    """
    buckets: dict[Any, list[Outline]] = defaultdict(list)
    known = {o.difficulty for o in outlines} - {None}
    if 1 < len(known) <= MAX_BUCKETS:
        for o in outlines:
            if o.difficulty is not None:
                buckets[o.difficulty].append(o)
        return {"by": "difficulty in the corpus", "buckets": _rates({key: buckets[key] for key in sorted(known)})}
    of_problem: dict[str, list[Outline]] = defaultdict(list)
    for o in outlines:
        if o.y_o is not None:
            of_problem[o.problem_id].append(o)
    for group in of_problem.values():
        half = len(group) // 2
        if half:
            buckets[pass_bucket(sum(bool(o.y_o) for o in group[:half]) / half)] += group[half:]
    ordered = {name: buckets[name] for name in PASS_BUCKETS if name in buckets}
    if len(ordered) < 2:
        return {}
    return {"by": "pass rate in the first half of the problem's y_o", "buckets": _rates(ordered)}


PASS_BUCKETS = ("0 %", "up to 50 %", "above 50 %", "100 %")


def pass_bucket(rate: float) -> str:
    """Name the bucket of a pass rate in [0, 1]."""
    return PASS_BUCKETS[0 if rate == 0 else 3 if rate == 1 else 1 if rate <= 0.5 else 2]


def _rates(buckets: Mapping[Any, Sequence[Outline]]) -> list[dict[str, Any]]:
    rows = []
    for name, group in buckets.items():
        row: dict[str, Any] = {"bucket": str(name)}
        for which in ("y_o", "y_r"):
            verdicts = [(o.problem_id, getattr(o, which)) for o in group if getattr(o, which) is not None]
            if verdicts:
                row[which] = _rate(verdicts)
        rows.append(row)
    return rows


def _rate(verdicts: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Return the mean over problems; trajectories of one problem are not independent."""
    of_problem: dict[str, list[bool]] = defaultdict(list)
    for problem, verdict in verdicts:
        of_problem[problem].append(verdict)
    means = [sum(group) / len(group) for group in of_problem.values()]
    alone = len(means) == len(verdicts)
    interval = wilson_interval(int(sum(means)), len(means)) if alone else bootstrap_interval(means)
    return {"pass": float(np.mean(means)), "interval": list(interval), "problems": len(means), "n": len(verdicts)}
