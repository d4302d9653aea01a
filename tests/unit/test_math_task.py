"""What the mathematics task makes of a response."""

from __future__ import annotations

import pytest

from megatron_trd.config.schema import DataConfig
from megatron_trd.records import Problem
from megatron_trd.tasks.math_problems import MathTask


def problem(answer: str, **metadata: object) -> Problem:
    return Problem(id="p", prompt="?", answer=answer, metadata=metadata)


def test_the_last_box_after_the_thinking_counts() -> None:
    task = MathTask(DataConfig())
    assert task.grade(problem("73"), r"<think>\boxed{1}</think>It is \boxed{073}.", "stop").correct
    assert task.grade(problem("011"), r"\boxed{12}", "stop").outcome == "wrong"
    assert task.grade(problem("11"), "eleven", "stop").outcome == "no_answer"
    assert task.grade(problem("11"), r"<think>\boxed{11}", "length").outcome == "truncated"


@pytest.mark.parametrize(("profile", "right"), [("default", True), ("strict-string", False), ("amo", True)])
def test_the_profile_decides_whether_a_leading_zero_matters(profile: str, right: bool) -> None:
    task = MathTask(DataConfig(math_verifier_profile=profile))  # type: ignore[arg-type]
    assert task.grade(problem("073"), r"### The final answer is: \boxed{73}", "stop").correct is right


def test_metadata_says_how_the_amo_parser_compares() -> None:
    task = MathTask(DataConfig(math_verifier_profile="amo"))
    points = [{"n": 2}, {"n": 5}]
    formula = problem(r"\boxed{n^2 - 1}", amo_answer_type="variable", amo_points=points)
    assert task.grade(formula, r"### The final answer is: $\boxed{(n-1)(n+1)}$", "stop").correct
    assert not task.grade(formula, r"### The final answer is: $\boxed{n^2 + 1}$", "stop").correct
