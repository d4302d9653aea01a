"""The method's order of events: what waits for what, what failures do, how seeds are drawn, what is counted."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.records import (
    Candidate,
    Completion,
    FinishReason,
    KeptPrefix,
    Outcome,
    PrefixProbe,
    Problem,
    Reasoning,
    Selection,
    Verdict,
)
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.grading import warn_of_grader_errors
from megatron_trd.rollout.refine import RolloutRunner, stable_seed
from megatron_trd.rollout.summary import summarize, verdicts_of
from scripted_rollouts import RIGHT, TOKENIZER, WRONG, LastLine, completion, said, trajectory
from scripted_rollouts import Engine as CountingEngine
from scripted_rollouts import Renderer as TellingRenderer

SAMPLING = SamplingParams(max_new_tokens=4)


class Task:
    """Answers are right when they equal the problem's."""

    name, template_dir, epistemic_words = "words", Path(), ()

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        return Verdict(outcome="correct" if response == problem.answer else "wrong")


class Renderer:
    """Prompts whose ids tell where they come from."""

    tokenizer = TOKENIZER

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id),)

    def vanilla(self, problem: Problem) -> tuple[tuple[int, ...], int]:
        return (int(problem.id), 1), 5

    def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
        return (int(problem.id), 2), len(y_o_text)


class Engine:
    """Answers with what a coroutine function says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[tuple[int, ...], int | None]] = []

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.asked.append((tuple(prompt_ids), params.sampling_seed))
        return await self.answer(tuple(prompt_ids))


def problems(num: int) -> list[Problem]:
    return [Problem(id=str(i), prompt="x", answer="right") for i in range(num)]


def runner(student: Engine, refiner: Engine | None, seed: int = 0) -> RolloutRunner:
    return RolloutRunner(student, refiner, Renderer(), Task(), SAMPLING, seed)  # type: ignore[arg-type]


def test_refinement_starts_when_its_own_rollout_ends() -> None:
    """Problem 0's rollout ends only after problem 1 was refined: with a barrier this would wait forever."""

    async def main() -> None:
        refined_1 = asyncio.Event()

        async def roll_out(prompt: tuple[int, ...]) -> Completion:
            if prompt == (0,):
                await refined_1.wait()
            return completion("right" if prompt == (0,) else "wrong")

        async def refine(prompt: tuple[int, ...]) -> Completion:
            if prompt == (1, 2):
                refined_1.set()
            return completion("right")

        run = runner(Engine(roll_out), Engine(refine))
        order = [t.problem.id async for t in run.stream(problems(2), iteration=0)]
        assert order == ["1", "0"]
        refined_1.clear()
        done = (await run.run(problems(2), iteration=0)).trajectories
        assert [t.problem.id for t in done] == ["0", "1"]
        assert [(t.y_o_correct, t.y_r_correct) for t in done] == [(True, True), (False, True)]
        assert [t.refine_prompt_ids for t in done] == [(0, 2), (1, 2)] and done[1].refine_cut_tokens == len("wrong")
        assert [(t.vanilla_prompt_ids, t.vanilla_cut_tokens) for t in done] == [((0, 1), 5), ((1, 1), 5)]
        assert all(t.kept is t.selection is t.y_r_reasoning is None for t in done)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_failed_rollout_is_not_refined_and_stops_nobody() -> None:
    async def main() -> None:
        async def roll_out(prompt: tuple[int, ...]) -> Completion:
            return completion("", "abort", ()) if prompt == (1,) else completion("right")

        async def refine(prompt: tuple[int, ...]) -> Completion:
            return completion("", "abort", ()) if prompt == (2, 2) else completion("right")

        refiner = Engine(refine)
        done = (await runner(Engine(roll_out), refiner).run(problems(4), iteration=0)).trajectories
        assert [t.y_o_correct for t in done] == [True, None, True, True]
        assert [t.y_r_correct for t in done] == [True, None, None, True]
        assert done[1].y_r is None and done[1].refine_prompt_ids == ()
        assert sorted(prompt for prompt, _ in refiner.asked) == [(0, 2), (2, 2), (3, 2)]

    asyncio.run(main())


def test_seeds_depend_on_run_iteration_problem_and_stage_alone() -> None:
    async def seeds(seed: int, iteration: int, ids: Sequence[int]) -> dict[tuple[int, ...], int | None]:
        async def answer(_: tuple[int, ...]) -> Completion:
            return completion()

        student, refiner = Engine(answer), Engine(answer)
        await runner(student, refiner, seed).run([problems(9)[i] for i in ids], iteration)
        return dict(student.asked + refiner.asked)

    first = asyncio.run(seeds(1, 0, range(5)))
    assert len(set(first.values())) == 10
    again = asyncio.run(seeds(1, 0, (4, 2)))
    assert all(first[prompt] == seed for prompt, seed in again.items())
    assert not set(first.values()) & set(asyncio.run(seeds(1, 1, range(5))).values())
    assert not set(first.values()) & set(asyncio.run(seeds(2, 0, range(5))).values())
    assert stable_seed(1, 0, "arithmetic-train-0", "y_o") == 126667307691197


def test_a_prompt_that_cannot_be_rendered_stops_the_stream_with_its_error() -> None:
    class Strict(Renderer):
        def solve(self, problem: Problem) -> tuple[int, ...]:
            if problem.id == "2":
                raise ValueError("--max-prompt-tokens 4: the prompt of problem 2 has 9 tokens")
            return super().solve(problem)

    async def answer(_: tuple[int, ...]) -> Completion:
        return completion()

    run = RolloutRunner(Engine(answer), None, Strict(), Task(), SAMPLING, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="problem 2"):
        asyncio.run(asyncio.wait_for(run.run(problems(5), 0), 30))


# ------------------------------------------------------------------ grading


def test_grading_goes_on_beside_sampling_and_in_parallel() -> None:
    """The verifier of y_o 0 waits for that of y_o 1, whose y_r has been sampled by then."""
    graded_1 = threading.Event()

    class Waiting(Task):
        def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
            if problem.id == "1" and response == "refined":
                graded_1.set()
            assert problem.id != "0" or graded_1.wait(30)
            return RIGHT

    async def roll_out(_: tuple[int, ...]) -> Completion:
        return completion("raw")

    async def refine(_: tuple[int, ...]) -> Completion:
        return completion("refined")

    run = RolloutRunner(Engine(roll_out), Engine(refine), Renderer(), Waiting(), SAMPLING, 0)  # type: ignore[arg-type]
    done = asyncio.run(asyncio.wait_for(run.run(problems(2), 0), 60)).trajectories
    assert [(t.y_o_verdict, t.y_r_verdict) for t in done] == [(RIGHT, RIGHT)] * 2


def test_a_verifier_that_raises_stops_nobody_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    answers = {"0": "42", "1": "!", "2": "&", "3": "?", "4": "7"}
    student = CountingEngine(lambda prompt, _: said(answers[prompt[1]]))
    run = RolloutRunner(student, None, TellingRenderer(), LastLine(), SAMPLING, 0)  # type: ignore[arg-type]
    asked = [Problem(id=key, prompt="x", answer="42") for key in answers]
    with caplog.at_level(logging.WARNING):
        batch = asyncio.run(asyncio.wait_for(run.run(asked, 0), 30))
    outcomes = [t.y_o_verdict.outcome for t in batch.trajectories if t.y_o_verdict]
    assert outcomes == ["correct", "grader_error", "grader_error", "no_answer", "wrong"]
    assert batch.trajectories[1].y_o_verdict is not None
    assert batch.trajectories[1].y_o_verdict.error == "RuntimeError: the verifier met a response it was not made for"
    (record,) = caplog.records
    assert "2 of 5 responses" in record.getMessage() and "problem 1: RuntimeError: the verifier" in record.getMessage()
    metrics = batch.metrics()
    assert metrics["rollout/y_o_pass"] == pytest.approx(1 / 3), "of those that somebody knows about"
    assert metrics["rollout/y_o_verdict_grader_error"] == 0.4 and metrics["rollout/y_o_verdict_no_answer"] == 0.2


@pytest.mark.parametrize(("num_errors", "warns"), [(0, False), (1, False), (2, True)])
def test_a_warning_needs_more_than_one_error_in_a_hundred(
    num_errors: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """100 verdicts in 25 trajectories, the errors among the rejected refinements and the continuations."""
    errors = iter([Verdict(outcome="grader_error", error="e")] * num_errors)
    batch = [
        trajectory(
            selection=Selection(
                chosen=0, reason="first", rejected=(Candidate(completion=said("a"), verdict=next(errors, WRONG)),)
            ),
            kept=kept(1, [next(errors, WRONG)]),
        )
        for _ in range(25)
    ]
    with caplog.at_level(logging.WARNING):
        warn_of_grader_errors(verdicts_of(batch))
    assert bool(caplog.records) is warns


# ------------------------------------------------------------------ metrics

TRUNCATED = completion("cut", "length", [7, 8])
FAILED = completion("", "abort", [])


def kept(num_tokens: int, verdicts: Sequence[Verdict | None]) -> KeptPrefix:
    probe = PrefixProbe(num_steps=1, num_tokens=num_tokens, verdicts=tuple(verdicts))
    return KeptPrefix(num_tokens=num_tokens, num_steps=1, total_steps=2, probes=(probe,))


def test_summary_counts_what_is_there_and_leaves_out_what_is_not() -> None:
    batch = [
        trajectory(),
        trajectory(y_o_verdict=RIGHT, refine_cut_tokens=3),
        trajectory(y_r=TRUNCATED, y_r_verdict=Verdict(outcome="truncated")),
        trajectory(y_o=FAILED, y_o_verdict=None, y_r=None, y_r_verdict=None, refine_prompt_ids=()),
    ]
    metrics = summarize(batch)
    assert metrics["rollout/y_o_pass"] == pytest.approx(1 / 3) and metrics["rollout/y_r_pass"] == pytest.approx(2 / 3)
    assert metrics["rollout/y_o_failed"] == 0.25 and metrics["rollout/y_r_truncated"] == pytest.approx(1 / 3)
    outcomes = {name: metrics[f"rollout/{name}"] for name in ("pass_pass", "pass_fail", "fail_pass", "fail_fail")}
    assert outcomes == {"pass_pass": 1, "pass_fail": 0, "fail_pass": 1, "fail_fail": 1}
    assert metrics["rollout/y_r_tokens"] == pytest.approx(8 / 3) and metrics["rollout/y_r_tokens_incorrect"] == 2
    assert metrics["rollout/refine_cut"] == pytest.approx(1 / 3)
    assert metrics["rollout/y_r_verdict_truncated"] == pytest.approx(1 / 3)
    assert metrics["rollout/y_o_verdict_truncated"] == metrics["rollout/y_o_verdict_grader_error"] == 0
    optional = ("select", "kept", "reasoning")
    assert not [tag for tag in metrics if any(name in tag for name in optional)]
    alone = summarize([trajectory(y_r=None, y_r_verdict=None, refine_prompt_ids=())])
    assert not [tag for tag in alone if "y_r" in tag or "pass_" in tag or "refine" in tag]
    ungraded = summarize([trajectory(y_o=FAILED, y_o_verdict=None, y_r=None, y_r_verdict=None)])
    assert not [tag for tag in ungraded if "pass" in tag or "verdict" in tag]


@pytest.mark.parametrize("outcome", ["correct", "wrong", "no_answer", "truncated", "grader_error", None])
def test_what_a_verdict_says_about_right_and_wrong(outcome: Outcome | None) -> None:
    verdict = None if outcome is None else Verdict(outcome=outcome)
    expected = {"correct": True, "grader_error": None, None: None}.get(outcome, False)
    made = trajectory(y_o_verdict=verdict, y_r_verdict=verdict)
    assert made.y_o_correct is expected and made.y_r_correct is expected


def test_summary_of_choices_prefixes_and_reasoning() -> None:
    def chosen(place: int, reason: Any, *others: Verdict | None) -> Selection:
        rejected = tuple(Candidate(completion=said("a"), verdict=verdict) for verdict in others)
        return Selection(chosen=place, reason=reason, rejected=rejected)

    batch = [
        trajectory(selection=chosen(0, "first_verified", WRONG)),
        trajectory(selection=chosen(1, "first_verified", WRONG)),
        trajectory(selection=chosen(1, "shortest_verified", RIGHT)),
        trajectory(selection=chosen(0, "none_verified", WRONG), y_r_verdict=WRONG),
        trajectory(selection=chosen(1, "first_verified", None)),  # the first one failed
        trajectory(kept=kept(2, [RIGHT, None, Verdict(outcome="grader_error"), WRONG])),
        trajectory(kept=kept(1, [WRONG] * 2), y_o=completion("raw", ids=[1, 2, 3, 4])),
        trajectory(y_r_reasoning=Reasoning(num_tokens=3, student_suffix_ids=(), teacher_suffix_ids=())),
        trajectory(y_r_reasoning=Reasoning(num_tokens=1, student_suffix_ids=(), teacher_suffix_ids=())),
    ]
    metrics = summarize(batch)
    expected = {
        "select_not_first": 3 / 5,
        "select_first_pass": 2 / 4,
        "select_gained": 1 / 4,
        "select_none_verified": 1 / 5,
        "kept_tokens": 3 / 2,
        "kept_share": (2 / 3 + 1 / 4) / 2,
        "kept_continuations": 6 / 2,
        "kept_continuations_ungraded": 2 / 6,
        "y_r_reasoning_tokens": 2,
        "y_r_reasoning_unclosed": 1 / 2,
    }
    assert {name: metrics[f"rollout/{name}"] for name in expected} == pytest.approx(expected)
