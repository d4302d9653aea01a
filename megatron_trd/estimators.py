"""Scores of K samples per problem and how sure they are. Numbers in, numbers out.

A *matrix* has one row per problem and one verdict per sample; None = nobody knows (a failed request or grading), which
is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb, sqrt
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = Sequence[Sequence[bool | None]]
Interval: TypeAlias = tuple[float, float]

NUM_RESAMPLES = 10_000
LEVEL = 0.95


def scores(correct: Matrix) -> dict[str, Any]:
    """Return avg@k and pass@k as fractions with 95 % intervals (`<name>_interval`), and the pass@k curve.

    k is the length of the longest row. Problems without enough verdicts are left out; what no problem can give is
    absent. With one sample per problem the intervals are Wilson's, else problems are drawn anew. `within_problem_error`
    is the standard error of avg@k over these very problems.
    """
    k = max(map(len, correct))
    found: dict[str, Any] = {}
    for name, values in ((f"avg@{k}", averages(correct)), (f"pass@{k}", passes(correct, k))):
        if known := known_values(values):
            found[name] = float(np.mean(known))
            interval = wilson_interval(round(sum(known)), len(known)) if k == 1 else bootstrap_interval(known)
            found[f"{name}_interval"] = list(interval)
    if (error := within_problem_error(correct)) is not None:
        found["within_problem_error"] = error
    curve = {j: known_values(passes(correct, j)) for j in curve_points(k)}
    return found | {"pass_curve": {str(j): float(np.mean(values)) for j, values in curve.items() if values}}


def known_values(values: Sequence[float | None]) -> list[float]:
    """Leave out None."""
    return [value for value in values if value is not None]


def averages(correct: Matrix) -> list[float | None]:
    """Return each problem's share of right samples, which estimates its pass@1; None without any verdict."""
    known = [[verdict for verdict in row if verdict is not None] for row in correct]
    return [sum(row) / len(row) if row else None for row in known]


def passes(correct: Matrix, k: int) -> list[float | None]:
    """Return each problem's unbiased pass@k from all its n samples; None with fewer than k."""
    known = [[verdict for verdict in row if verdict is not None] for row in correct]
    return [pass_at_k(len(row), sum(row), k) if len(row) >= k else None for row in known]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one.

    The estimator of arXiv 2107.03374, equation 1.
    """
    return 1.0 - comb(n - c, k) / comb(n, k)


def curve_points(k: int) -> list[int]:
    """Return the k of a pass@k curve: powers of two below k, and k."""
    return [*(2**i for i in range(k.bit_length()) if 2**i < k), k]


def within_problem_error(correct: Matrix) -> float | None:
    """Return the standard error of the mean of `averages` over these very problems, sampled anew.

    sqrt(sum_i p_i (1 - p_i) / (n_i - 1)) / P, with the unbiased variance of each p_i; None if a problem has fewer than
    two verdicts.
    """
    known = [[verdict for verdict in row if verdict is not None] for row in correct]
    if not known or any(len(row) < 2 for row in known):
        return None
    shares = [(sum(row) / len(row), len(row)) for row in known]
    return sqrt(sum(p * (1 - p) / (n - 1) for p, n in shares)) / len(known)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % percentile bootstrap interval of the mean of one value per problem, problems drawn anew."""
    return _interval(_resampled_means(values, seed))


def macro_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Return the same for the mean of the groups' means: the problems of each group are drawn anew in every draw."""
    draws = [_resampled_means(values, seed + index) for index, values in enumerate(groups)]
    return _interval(np.mean(draws, axis=0))


def wilson_interval(num_right: int, num: int) -> Interval:
    """Return Wilson's 95 % interval of a share of independent trials: one sample per problem, never all samples."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = num_right / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_differences(before: Matrix, after: Matrix) -> list[float]:
    """Return after - before of each problem's average, where both have one. Rows are the same problems."""
    pairs = zip(averages(before), averages(after), strict=True)
    return [b - a for a, b in pairs if a is not None and b is not None]


def _resampled_means(values: Sequence[float], seed: int) -> NDArray[np.float64]:
    return _resampling_counts(len(values), seed) @ np.asarray(values, dtype=np.float64) / len(values)


@lru_cache(maxsize=4)
def _resampling_counts(num: int, seed: int) -> NDArray[np.float64]:
    """Return how often each resample holds every problem. [resamples, problems]"""
    return np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES).astype(np.float64)


def _interval(means: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
