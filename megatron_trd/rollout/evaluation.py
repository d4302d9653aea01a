"""K samples per held-out problem: avg@k and pass@k with intervals, and paired differences."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np

from megatron_trd.records import Completion, Problem
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.refine import stable_seed
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Verdicts on every sample of every problem."""

    problem_ids: tuple[str, ...]
    correct: tuple[tuple[bool | None, ...], ...]
    """[problem][sample]; None where the request failed: missing is not wrong."""
    finish_reasons: Mapping[str, int]
    mean_tokens: float
    weight_versions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return scores as fractions with 95 % bootstrap intervals over problems, and all verdicts, as plain values."""
        k = max(map(len, self.correct))
        result: dict[str, Any] = {}
        for name, values in ((f"avg@{k}", averages(self.correct)), (f"pass@{k}", passes(self.correct, k))):
            known = [value for value in values if value is not None]
            if known:
                result[name] = float(np.mean(known))
                result[f"{name}_interval"] = list(bootstrap_interval(known))
        curve = {j: [v for v in passes(self.correct, j) if v is not None] for j in _curve_points(k)}
        return result | {
            "pass_curve": {str(j): float(np.mean(values)) for j, values in curve.items() if values},
            "finish_reasons": dict(self.finish_reasons),
            "mean_tokens": self.mean_tokens,
            "weight_versions": list(self.weight_versions),
            "problem_ids": list(self.problem_ids),
            "correct": [list(row) for row in self.correct],
        }


async def evaluate(
    engine: RolloutEngine,
    renderer: Renderer,
    task: Task,
    num_problems: int,
    num_samples: int,
    sampling: SamplingParams,
    seed: int,
) -> EvalResult:
    """Sample and grade; the same seed gives the same random numbers to every model.

    Raises:
        ServerError: not one request succeeded.
    """
    problems = task.eval_problems(num_problems)
    loop = asyncio.get_running_loop()

    async def one(problem: Problem, prompt_ids: Sequence[int], index: int) -> tuple[Completion, bool | None]:
        params = replace(sampling, sampling_seed=stable_seed(seed, "eval", problem.id, index))
        completion = await engine.generate(prompt_ids, params)
        if completion.finish_reason == "abort":
            return completion, None
        verdict = await loop.run_in_executor(None, task.grade, problem, completion.text, completion.finish_reason)
        return completion, None if verdict.outcome == "grader_error" else verdict.correct

    prompts = [renderer.solve(problem) for problem in problems]
    graded = await asyncio.gather(
        *(one(p, ids, i) for p, ids in zip(problems, prompts, strict=True) for i in range(num_samples))
    )
    completions = [completion for completion, _ in graded]
    whole = [completion for completion in completions if completion.finish_reason != "abort"]
    if not whole:
        raise ServerError(f"evaluation: all {len(completions)} requests failed: {completions[0].error}")
    verdicts = [verdict for _, verdict in graded]
    return EvalResult(
        problem_ids=tuple(problem.id for problem in problems),
        correct=tuple(tuple(verdicts[i : i + num_samples]) for i in range(0, len(verdicts), num_samples)),
        finish_reasons=dict(Counter(completion.finish_reason for completion in completions)),
        mean_tokens=sum(len(completion.token_ids) for completion in whole) / len(whole),
        weight_versions=tuple(sorted({version for completion in whole for version in completion.weight_versions})),
    )


def averages(correct: Sequence[Sequence[bool | None]]) -> list[float | None]:
    """Return each problem's share of right samples; None without any."""
    known = [[verdict for verdict in row if verdict is not None] for row in correct]
    return [sum(row) / len(row) if row else None for row in known]


def passes(correct: Sequence[Sequence[bool | None]], k: int) -> list[float | None]:
    """Return each problem's unbiased pass@k from its n samples; None with fewer than k."""
    known = [[verdict for verdict in row if verdict is not None] for row in correct]
    return [pass_at_k(len(row), sum(row), k) if len(row) >= k else None for row in known]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, resampling problems with replacement."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (NUM_RESAMPLES, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two results (`as_dict`) problem by problem: mean of after - before, 95 % interval, problems.

    Raises:
        ValueError: they are not about the same problems.
    """
    if before["problem_ids"] != after["problem_ids"]:
        raise ValueError("paired difference: the two evaluations are about different problems; use the same --task")
    pairs = zip(averages(before["correct"]), averages(after["correct"]), strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    if not differences:
        raise ValueError("paired difference: no problem was graded in both evaluations; look at the servers' logs")
    return {
        "mean": float(np.mean(differences)),
        "interval": list(bootstrap_interval(differences)),
        "num_problems": len(differences),
    }


def _curve_points(k: int) -> list[int]:
    return [*(2**i for i in range(k.bit_length()) if 2**i < k), k]
