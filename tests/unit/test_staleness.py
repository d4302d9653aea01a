"""How old a batch may be: the count, the bound, and what is done about a completion beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_trd.records import Completion, FinishReason, Problem, Trajectory, Verdict, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.refine import MAX_REDONE, RolloutBatch, RolloutRunner
from megatron_trd.rollout.staleness import behind, iteration_of, staleness_metrics, weight_version
from scripted_rollouts import TOKENIZER

SAMPLING = SamplingParams(max_new_tokens=4)


def sampled_by(*versions: str) -> Completion:
    spans = tuple(VersionSpan(version=version, start=i, end=i + 1) for i, version in enumerate(versions))
    return Completion(token_ids=(7,) * len(spans), text="ok", finish_reason="stop", weight_spans=spans)


def by(*iterations: int) -> Completion:
    return sampled_by(*map(weight_version, iterations))


def trajectory(y_o: Completion, y_r: Completion | None = None) -> Trajectory:
    problem = Problem(id="p", prompt="x", answer="1")
    return Trajectory(
        problem=problem, y_o=y_o, y_o_verdict=None, solve_prompt_ids=(1,), vanilla_prompt_ids=(1,), y_r=y_r
    )


def test_a_version_names_its_iteration() -> None:
    assert weight_version(12) == "iter_0000012"
    assert [iteration_of(v) for v in ("iter_0000012", "iter_12345678", "default", "", None)] == [
        12,
        12345678,
        *[None] * 3,
    ]


def test_the_oldest_token_counts() -> None:
    assert behind([by(4)], 4) == 0
    assert behind([by(3, 4), by(2, 4), None], 4) == 2
    assert behind([sampled_by("default", weight_version(4))], 4) is None
    assert behind([Completion(token_ids=(), text="", finish_reason="abort")], 4) is None


def test_metrics_count_what_the_student_wrote() -> None:
    batch = [trajectory(by(4)), trajectory(by(3, 4), by(1)), trajectory(by(4), sampled_by("default"))]
    ages = {"rollout/staleness_mean": pytest.approx(1 / 3), "rollout/staleness_max": 1.0}
    assert staleness_metrics(batch, 4, student_refines=False) == ages
    assert staleness_metrics(batch, 4, student_refines=True) == {
        "rollout/staleness_mean": pytest.approx(1.5),  # of 0 and 3; that of the last one is unknown
        "rollout/staleness_max": 3.0,
    }
    assert staleness_metrics([trajectory(sampled_by("default"))], 4, student_refines=False) == {}


class Renderer:
    """Prompts that say whose they are."""

    tokenizer = TOKENIZER

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id),)

    def vanilla(self, problem: Problem) -> tuple[tuple[int, ...], int]:
        return (int(problem.id),), 0

    def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
        return (int(problem.id), 2), 0


class Task:
    """Every answer is right."""

    name, template_dir, epistemic_words = "any", Path(), ()

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        return Verdict(outcome="correct")


class Engine:
    """Answers a prompt with one completion after another; the last one stays."""

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[Completion]]) -> None:
        self.answers = {prompt: list(completions) for prompt, completions in answers.items()}
        self.num_asked = 0

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.num_asked += 1
        left = self.answers[tuple(prompt_ids)]
        return left.pop(0) if len(left) > 1 else left[0]


def run(student: Engine, refiner: Engine, max_staleness: int | None) -> RolloutBatch:
    problems = [Problem(id=str(i), prompt="x", answer="1") for i in range(2)]
    parts = (Renderer(), Task(), SAMPLING, 0)
    runner = RolloutRunner(student, refiner, *parts, max_staleness=max_staleness)  # type: ignore[arg-type]
    return asyncio.run(asyncio.wait_for(runner.run(problems, 5), 30))


def test_what_is_older_than_the_bound_is_sampled_again() -> None:
    fresh = {(0,): [by(2), by(3, 4), by(4, 5)], (1,): [by(4)]}
    teacher = Engine({(0, 2): [sampled_by("default")], (1, 2): [by(0)]})
    student = Engine(fresh)
    batch = run(student, teacher, max_staleness=1)
    assert [t.y_o for t in batch.trajectories] == [by(4, 5), by(4)]
    assert batch.trajectories[1].y_r == by(0), "the teacher's weights have no age"
    assert student.num_asked == 4 and teacher.num_asked == 2
    tags = batch.metrics()
    assert tags["rollout/redone_stale"] == 2
    assert (tags["rollout/staleness_mean"], tags["rollout/staleness_max"]) == (1, 1)


def test_a_student_that_refines_is_held_to_the_bound_in_both_stages() -> None:
    student = Engine({(0,): [by(5)], (0, 2): [by(3), by(5)], (1,): [by(5)], (1, 2): [by(4)]})
    batch = run(student, student, max_staleness=1)
    assert [t.y_r for t in batch.trajectories] == [by(5), by(4)]
    assert batch.metrics()["rollout/redone_stale"] == 1 and batch.metrics()["rollout/staleness_mean"] == 0.5


def test_on_policy_takes_what_the_engine_gives() -> None:
    student = Engine({(0,): [sampled_by("default")], (1,): [by(0)]})
    batch = run(student, Engine({(0, 2): [by(5)], (1, 2): [by(5)]}), max_staleness=None)
    assert student.num_asked == 2 and "rollout/redone_stale" not in batch.metrics()


def test_a_completion_that_stays_too_old_fails_by_name() -> None:
    student = Engine({(0,): [by(3)], (1,): [sampled_by("default")]})
    batch = run(student, Engine({}), max_staleness=1)
    assert student.num_asked == 2 * (MAX_REDONE + 1)
    for done, version in zip(batch.trajectories, ("iter_0000003", "default"), strict=True):
        assert done.y_o.finish_reason == "abort" and done.y_r is None
        assert f"--rollout-staleness 1: sampled {MAX_REDONE + 1} times" in str(done.y_o.error)
        assert version in str(done.y_o.error)
