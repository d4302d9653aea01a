"""Scores against closed forms; intervals against simulated benchmarks whose truth is known."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, prod
from statistics import NormalDist

import numpy as np
import pytest

from megatron_trd.estimators import (
    averages,
    bootstrap_interval,
    curve_points,
    macro_interval,
    paired_differences,
    pass_at_k,
    passes,
    scores,
    wilson_interval,
    within_problem_error,
)

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize("n", range(1, 17))
def test_pass_at_k_equals_the_published_product(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            missed = Fraction(0) if n - c < k else prod((1 - Fraction(k, i) for i in range(n - c + 1, n + 1)), start=1)
            assert pass_at_k(n, c, k) == pytest.approx(float(1 - missed), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_unknown_samples_are_not_wrong_samples() -> None:
    rows = [[True, None, False], [None, None, None], [True, True, True]]
    assert averages(rows) == [0.5, None, 1.0]
    assert passes(rows, 2) == [1.0, None, 1.0] and passes(rows, 3) == [None, None, 1.0]
    found = scores(rows)
    assert found["avg@3"] == 0.75 and found["pass@3"] == 1.0
    assert "within_problem_error" not in found
    assert scores([[None, None]]) == {"pass_curve": {}}


def test_scores_of_a_known_matrix() -> None:
    rows = [[True] * j + [False] * (8 - j) for j in (0, 1, 4, 8)]
    found = scores(rows)
    assert found["avg@8"] == pytest.approx(13 / 32) and found["pass@8"] == 0.75
    assert found["avg@8_interval"] == list(bootstrap_interval([0, 1 / 8, 1 / 2, 1]))
    assert list(found["pass_curve"]) == ["1", "2", "4", "8"]
    assert found["pass_curve"]["1"] == pytest.approx(13 / 32)
    assert found["pass_curve"]["2"] == pytest.approx((0 + 1 / 4 + 1 - 6 / 28 + 1) / 4)
    assert [curve_points(k) for k in (1, 12, 16)] == [[1], [1, 2, 4, 8, 12], [1, 2, 4, 8, 16]]


def test_one_sample_per_problem_has_wilsons_interval() -> None:
    found = scores([[True]] * 7 + [[False]] * 23)
    assert found["avg@1_interval"] == list(wilson_interval(7, 30))
    for num_right, num in ((0, 30), (7, 30), (30, 30)):
        for bound in wilson_interval(num_right, num):  # where the observed share is z standard errors away
            assert (num_right / num - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / num, abs=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_error_on_these_problems_is_unbiased(p: float) -> None:
    n = 6
    expected = 0.0
    for c in range(n + 1):
        error = within_problem_error([[True] * c + [False] * (n - c)])
        assert error is not None
        expected += comb(n, c) * p**c * (1 - p) ** (n - c) * error**2
    assert expected == pytest.approx(p * (1 - p) / n)
    many = within_problem_error([[True, False, False]] * 9)
    assert many == pytest.approx(np.sqrt(2 / 9 / 2 / 9))


def test_the_bootstrap_agrees_with_the_normal_interval_and_is_reproducible() -> None:
    values = np.random.default_rng(1).beta(2, 3, 2000)
    low, high = bootstrap_interval(values.tolist())
    half = Z * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values.tolist()) == (low, high) != bootstrap_interval(values.tolist(), seed=1)
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_the_macro_interval_draws_every_benchmark_by_itself() -> None:
    values = np.random.default_rng(2).beta(2, 3, 400)
    low, high = macro_interval([values.tolist(), (values + 0.2).tolist()])  # drawn together, they would vary together
    half = Z * np.sqrt(2 * values.var() / len(values)) / 2
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean() + 0.1, abs=0.1 * half)


# ------------------------------------- benchmarks of 30 problems, 16 samples each, difficulties beta(0.35, 0.55)

PROBLEMS, SAMPLES, SIMULATIONS = 30, 16, 400


def test_which_interval_covers_what() -> None:
    """The pooled Wilson interval is far too narrow for the population of problems; the bootstrap is right for it."""
    rng = np.random.default_rng(0)
    population = 0.35 / 0.9
    hits = []
    for _ in range(SIMULATIONS):
        difficulties = rng.beta(0.35, 0.55, PROBLEMS)
        right = rng.binomial(SAMPLES, difficulties)
        rows = [[True] * c + [False] * (SAMPLES - c) for c in right]
        pooled, whole = wilson_interval(int(right.sum()), PROBLEMS * SAMPLES), scores(rows)
        bootstrap, here = whole[f"avg@{SAMPLES}_interval"], difficulties.mean()
        hits.append(
            [
                pooled[0] <= population <= pooled[1],
                bootstrap[0] <= population <= bootstrap[1],
                pooled[0] <= here <= pooled[1],
                abs(whole[f"avg@{SAMPLES}"] - here) <= Z * whole["within_problem_error"],
            ]
        )
    wilson, bootstrap, wilson_here, error_here = np.mean(hits, axis=0)
    assert 0.41 <= wilson <= 0.58
    assert 0.89 <= bootstrap <= 0.97
    assert wilson_here >= 0.98
    assert 0.91 <= error_here <= 0.98


def test_how_often_a_paired_difference_shows_a_gain() -> None:
    rng = np.random.default_rng(0)
    shown = {}
    for gain in (0.0, 0.02, 0.05, 0.1):
        paired, apart = 0, 0
        for _ in range(SIMULATIONS):
            difficulties = rng.beta(0.35, 0.55, PROBLEMS)
            right = rng.binomial(SAMPLES, [difficulties, np.minimum(difficulties + gain, 1)])
            before, after = ([[True] * c + [False] * (SAMPLES - c) for c in side] for side in right)
            paired += bootstrap_interval(paired_differences(before, after))[0] > 0
            apart += scores(after)["avg@16_interval"][0] > scores(before)["avg@16_interval"][1]
        shown[gain] = paired / SIMULATIONS
        assert apart / SIMULATIONS <= 0.02
    assert shown[0.0] <= 0.07 and 0.08 <= shown[0.02] <= 0.24
    assert 0.45 <= shown[0.05] <= 0.65 and shown[0.1] >= 0.92
