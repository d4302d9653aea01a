"""Scores against closed forms and brute force."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from megatron_trd.records import Completion, FinishReason, Problem, Verdict, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.evaluation import (
    EvalResult,
    averages,
    bootstrap_interval,
    evaluate,
    paired_difference,
    pass_at_k,
    passes,
)
from megatron_trd.weight_sync.base import ServerError

SPANS = (VersionSpan(version="v1", start=0, end=2),)


def result(correct: Sequence[Sequence[bool | None]]) -> EvalResult:
    return EvalResult(
        problem_ids=tuple(map(str, range(len(correct)))),
        correct=tuple(map(tuple, correct)),
        finish_reasons={"stop": 1},
        mean_tokens=1.0,
        weight_versions=("v",),
    )


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_missing_samples_are_not_wrong_samples() -> None:
    rows = [[True, None, False], [None, None, None], [True, True, True]]
    assert averages(rows) == [0.5, None, 1.0]
    assert passes(rows, 2) == [1.0, None, 1.0] and passes(rows, 3) == [None, None, 1.0]
    scores = result(rows).as_dict()
    assert scores["avg@3"] == 0.75 and scores["pass@3"] == 1.0


def test_scores_of_a_known_matrix() -> None:
    rows = [[True] * j + [False] * (8 - j) for j in (0, 1, 4, 8)]
    scores = result(rows).as_dict()
    assert scores["avg@8"] == pytest.approx(13 / 32) and scores["pass@8"] == 0.75
    assert list(scores["pass_curve"]) == ["1", "2", "4", "8"]
    assert scores["pass_curve"]["1"] == pytest.approx(13 / 32)
    assert scores["pass_curve"]["2"] == pytest.approx((0 + 1 / 4 + 1 - 6 / 28 + 1) / 4)


def test_the_interval_agrees_with_the_normal_one_and_is_reproducible() -> None:
    values = np.random.default_rng(1).beta(2, 3, 2000)
    low, high = bootstrap_interval(values.tolist())
    half = NormalDist().inv_cdf(0.975) * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values.tolist()) == (low, high) != bootstrap_interval(values.tolist(), seed=1)
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.3 <= high for low, high in (bootstrap_interval((rng.random(60) < 0.3).tolist()) for _ in range(200))
    ]
    assert 0.89 <= np.mean(hits) <= 0.99


def test_pairing_removes_the_variance_of_problems() -> None:
    rng = np.random.default_rng(2)
    skill = rng.random(300)
    before = [(rng.random(8) < p).tolist() for p in skill]
    after = [[v or bool(rng.random() < 0.1) for v in row] for row in before]
    difference = paired_difference(result(before).as_dict(), result(after).as_dict())
    per_problem = np.mean(after, axis=1) - np.mean(before, axis=1)
    assert difference["mean"] == pytest.approx(per_problem.mean()) and difference["num_problems"] == 300
    low, high = difference["interval"]
    half = NormalDist().inv_cdf(0.975) * per_problem.std() / np.sqrt(300)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    unpaired = result(after).as_dict()["avg@8_interval"]
    assert high - low < 0.5 * (unpaired[1] - unpaired[0])
    with pytest.raises(ValueError, match="different problems"):
        paired_difference(result(before).as_dict(), result(before[1:]).as_dict())


class Coin:
    """An engine that is right when its seed says so, and a task of words."""

    name, template_dir, epistemic_words = "coin", Path(), ()

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.failing, self.seeds = failing, []

    def eval_problems(self, num: int) -> Sequence[Problem]:
        return [Problem(id=str(i), prompt="x", answer="even") for i in range(num)]

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id),)

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        return Verdict(outcome="correct" if response == problem.answer else "wrong")

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.seeds.append(params.sampling_seed)
        if prompt_ids[0] in self.failing:
            return Completion(token_ids=(), text="", finish_reason="abort", error="down")
        word = "even" if (params.sampling_seed or 0) % 2 == 0 else "odd"
        return Completion(token_ids=(1, 2), text=word, finish_reason="stop", weight_spans=SPANS)


def run(coin: Coin, seed: int = 0) -> EvalResult:
    return asyncio.run(evaluate(coin, coin, coin, 30, 4, SamplingParams(max_new_tokens=2), seed))  # type: ignore[arg-type]


def test_every_sample_has_its_own_reproducible_seed() -> None:
    coin = Coin()
    first = run(coin)
    assert len(set(coin.seeds)) == 120
    assert run(Coin()) == first != run(Coin(), seed=1)
    verdicts = [seed % 2 == 0 for seed in coin.seeds]
    assert first.correct == tuple(tuple(verdicts[i : i + 4]) for i in range(0, 120, 4))
    assert first.finish_reasons == {"stop": 120} and first.mean_tokens == 2 and first.weight_versions == ("v1",)


def test_failed_requests_are_missing_and_nothing_at_all_is_an_error() -> None:
    partly = run(Coin(failing=[3, 4]))
    assert partly.correct[3] == partly.correct[4] == (None,) * 4
    assert partly.finish_reasons == {"stop": 112, "abort": 8}
    assert partly.as_dict()["avg@4"] == pytest.approx(
        np.mean([r for i, r in enumerate(partly.correct) if i not in (3, 4)])
    )
    with pytest.raises(ServerError, match="all 120 requests failed: down"):
        run(Coin(failing=range(30)))
