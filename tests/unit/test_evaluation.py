"""Evaluation on held-out problems: requests, seeds, what is missing, paired differences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_trd.config.schema import Config, EvalConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Completion, FinishReason, Problem, Verdict, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.evaluation import EvalResult, evaluate, evaluation_sampling, paired_difference
from megatron_trd.weight_sync.base import ServerError

STUDENT = Path(__file__).parents[2] / "examples/quickstart_cpu/models/student"
SPANS = (VersionSpan(version="v1", start=0, end=2),)


def result(correct: Sequence[Sequence[bool | None]]) -> EvalResult:
    return EvalResult(
        problem_ids=tuple(map(str, range(len(correct)))),
        correct=tuple(map(tuple, correct)),
        finish_reasons={"stop": 1},
        mean_tokens=1.0,
        weight_versions=("v",),
    )


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


@pytest.mark.parametrize(
    ("flag", "thinking", "expected"),
    [
        ("rollout", False, (1.0, 1.0, -1)),
        ("paper", False, (0.6, 0.95, 20)),
        ("qwen3", True, (0.6, 0.95, 20)),
        ("qwen3", False, (0.7, 0.8, 20)),
    ],
)
def test_how_held_out_problems_are_sampled(flag: Any, thinking: bool, expected: tuple[float, float, int]) -> None:
    rollout = RolloutConfig(
        student_urls=("http://s",),
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        max_response_tokens=7,
        thinking=thinking,
    )
    model, tokenizer = ModelConfig(hf_checkpoint=str(STUDENT)), AutoTokenizer.from_pretrained(STUDENT)
    for budget, tokens in ((None, 7), (9, 9)):
        settings = EvalConfig(eval_sampling=flag, eval_max_response_tokens=budget)
        config = Config(method=MethodConfig(trajectory="y_o"), model=model, rollout=rollout, eval=settings)
        params = evaluation_sampling(config, tokenizer)
        assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (*expected, tokens)
        assert params.stop_token_ids == (tokenizer.eos_token_id,)
