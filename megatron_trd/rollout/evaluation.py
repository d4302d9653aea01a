"""Evaluation on the training task: K samples per held-out problem, and the paired difference of two results."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.estimators import bootstrap_interval, paired_differences, scores
from megatron_trd.records import Completion, Problem, Verdict
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.grading import Graders, warn_of_grader_errors
from megatron_trd.rollout.refine import sampling_params, stable_seed
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError


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
        """Return the scores (`estimators.scores`) and all verdicts, as plain values."""
        return scores(self.correct) | {
            "finish_reasons": dict(self.finish_reasons),
            "mean_tokens": self.mean_tokens,
            "weight_versions": list(self.weight_versions),
            "problem_ids": list(self.problem_ids),
            "correct": [list(row) for row in self.correct],
        }


def evaluation_sampling(config: Config, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """Return how held-out problems are sampled."""
    rollout, settings = config.rollout, config.eval
    params = sampling_params(rollout, tokenizer)
    params = replace(params, max_new_tokens=settings.eval_max_response_tokens or params.max_new_tokens)
    if settings.eval_sampling == "rollout":
        return params
    if settings.eval_sampling == "qwen3" and not rollout.thinking:
        return replace(params, temperature=0.7, top_p=0.8, top_k=20)
    return replace(params, temperature=0.6, top_p=0.95, top_k=20)


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
    graders = Graders(task)

    async def one(problem: Problem, prompt_ids: Sequence[int], index: int) -> tuple[Completion, Verdict | None]:
        params = replace(sampling, sampling_seed=stable_seed(seed, "eval", problem.id, index))
        completion = await engine.generate(prompt_ids, params)
        return completion, await graders.grade(problem, completion)

    prompts = [renderer.solve(problem) for problem in problems]
    graded = await asyncio.gather(
        *(one(p, ids, i) for p, ids in zip(problems, prompts, strict=True) for i in range(num_samples))
    )
    completions = [completion for completion, _ in graded]
    whole = [completion for completion in completions if completion.finish_reason != "abort"]
    if not whole:
        raise ServerError(f"evaluation: all {len(completions)} requests failed: {completions[0].error}")
    ids = [problem.id for problem in problems for _ in range(num_samples)]
    warn_of_grader_errors(zip(ids, (verdict for _, verdict in graded), strict=True))
    verdicts = [None if verdict is None else verdict.passed for _, verdict in graded]
    return EvalResult(
        problem_ids=tuple(problem.id for problem in problems),
        correct=tuple(tuple(verdicts[i : i + num_samples]) for i in range(0, len(verdicts), num_samples)),
        finish_reasons=dict(Counter(completion.finish_reason for completion in completions)),
        mean_tokens=sum(len(completion.token_ids) for completion in whole) / len(whole),
        weight_versions=tuple(sorted({version for completion in whole for version in completion.weight_versions})),
    )


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two results (`as_dict`) problem by problem: mean of after - before, 95 % interval, problems.

    Raises:
        ValueError: they are not about the same problems.
    """
    if before["problem_ids"] != after["problem_ids"]:
        raise ValueError("paired difference: the two evaluations are about different problems; use the same --task")
    differences = paired_differences(before["correct"], after["correct"])
    if not differences:
        raise ValueError("paired difference: no problem was graded in both evaluations; look at the servers' logs")
    return {
        "mean": float(np.mean(differences)),
        "interval": list(bootstrap_interval(differences)),
        "num_problems": len(differences),
    }
