"""Which of several refinements becomes y_r, and what is written down about the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Candidate, Completion, Problem, Reasoning, Verdict
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.refine import RolloutRunner, stable_seed
from megatron_trd.rollout.selection import is_good, select
from scripted_rollouts import Engine, LastLine, Renderer, said

RIGHT, WRONG = Verdict(outcome="correct"), Verdict(outcome="wrong")
UNKNOWN = Verdict(outcome="grader_error")


def candidate(verdict: Verdict | None, num_tokens: int = 5, finish_reason: Any = "stop") -> Candidate:
    ids = (7,) * num_tokens
    return Candidate(completion=Completion(token_ids=ids, text="a", finish_reason=finish_reason), verdict=verdict)


FAILED = candidate(None, 0, "abort")
CUT = candidate(RIGHT, 4, "length")  # right, but it would not be trained on


@pytest.mark.parametrize(
    ("candidates", "verified", "shortest"),
    [
        ([candidate(RIGHT), candidate(RIGHT)], (0, "first_verified"), (0, "shortest_verified")),
        ([candidate(WRONG), candidate(RIGHT, 9), candidate(RIGHT)], (1, "first_verified"), (2, "shortest_verified")),
        ([candidate(RIGHT, 9), candidate(WRONG, 2), candidate(RIGHT)], (0, "first_verified"), (2, "shortest_verified")),
        ([candidate(WRONG), candidate(WRONG, 2)], (0, "none_verified"), (0, "none_verified")),
        ([FAILED, candidate(UNKNOWN), candidate(WRONG)], (0, "none_verified"), (0, "none_verified")),
        ([FAILED, candidate(UNKNOWN), candidate(RIGHT)], (2, "first_verified"), (2, "shortest_verified")),
        ([CUT, candidate(RIGHT)], (1, "first_verified"), (1, "shortest_verified")),
        ([CUT, candidate(WRONG)], (0, "none_verified"), (0, "none_verified")),
        ([candidate(WRONG), candidate(RIGHT), candidate(RIGHT)], (1, "first_verified"), (1, "shortest_verified")),
    ],
)
def test_the_rules(candidates: list[Candidate], verified: tuple[int, str], shortest: tuple[int, str]) -> None:
    nothing = [None] * len(candidates)
    for rule, expected in (("first", (0, "first")), ("verified", verified), ("shortest-verified", shortest)):
        selection = select(candidates, nothing, rule)  # type: ignore[arg-type]
        assert selection is not None and (selection.chosen, selection.reason) == expected
        others = [c for i, c in enumerate(candidates) if i != selection.chosen]
        assert list(selection.rejected) == others


def test_a_refinement_that_only_reasons_is_not_verified() -> None:
    reasoning = Reasoning(num_tokens=5, student_suffix_ids=(), teacher_suffix_ids=())
    selection = select([candidate(RIGHT), candidate(RIGHT)], [reasoning, None], "verified")
    assert selection is not None and selection.chosen == 1


@pytest.mark.parametrize(
    ("y_r", "num_reasoning", "good"),
    [
        (said("a"), None, True),
        (said("a", "length"), None, False),
        (said("", "abort"), None, False),
        (said(" \n"), None, False),
        (said("<think>x</think>a"), 3, True),
        (said("<think>x</think>"), 3, False),  # nothing but the token that ends the turn is left
        (said("<think>x"), 3, False),  # the block never closes
    ],
)
def test_what_a_good_refinement_is(y_r: Completion, num_reasoning: int | None, good: bool) -> None:
    block = (
        None
        if num_reasoning is None
        else Reasoning(num_tokens=num_reasoning, student_suffix_ids=(), teacher_suffix_ids=())
    )
    assert is_good(y_r, block) is good


def refine(**method: Any) -> tuple[list[Any], Engine]:
    """Refine three problems; each request has the answer of its place in `ANSWERS`."""
    answers = {"0": ["41", "2\n42", "42"], "1": ["1", "2", "3"], "2": ["42", "42", "2\n42"]}
    refiner = Engine(lambda prompt, count: said(answers[prompt[1]][count]))
    student = Engine(lambda prompt, _: said("raw"))
    parts = (Renderer(), LastLine(), SamplingParams(max_new_tokens=9), 3)
    runner = RolloutRunner(student, refiner, *parts, method=MethodConfig(**method))  # type: ignore[arg-type]
    problems = [Problem(id=key, prompt="x", answer="42") for key in answers]
    return asyncio.run(asyncio.wait_for(runner.run(problems, 0), 30)).trajectories, refiner


@pytest.mark.parametrize(
    ("rule", "chosen"), [("first", (0, 0, 0)), ("verified", (1, 0, 0)), ("shortest-verified", (2, 0, 0))]
)
def test_all_are_sampled_graded_and_written_down(rule: str, chosen: tuple[int, ...]) -> None:
    plain, once = refine()
    done, refiner = refine(refine_samples=3, refine_select=rule)
    assert len(once.asked) == 3 and len(refiner.asked) == 9
    seeds = [params.sampling_seed for _, params in refiner.asked]
    first = {stable_seed(3, 0, problem_id, "y_r") for problem_id in "012"}
    assert len(set(seeds)) == 9 and {params.sampling_seed for _, params in once.asked} == first < set(seeds)
    assert tuple(t.selection.chosen for t in done) == chosen
    for before, after in zip(plain, done, strict=True):
        candidates = list(after.selection.rejected)
        candidates.insert(after.selection.chosen, Candidate(completion=after.y_r, verdict=after.y_r_verdict))
        assert candidates[0] == Candidate(completion=before.y_r, verdict=before.y_r_verdict)
        task, problem = LastLine(), after.problem
        assert [c.verdict for c in candidates] == [task.grade(problem, c.completion.text, "stop") for c in candidates]
        assert after.y_r_correct >= before.y_r_correct
        assert before.selection is None
