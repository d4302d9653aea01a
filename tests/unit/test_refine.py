"""The method's order of events, and what each kind of trajectory becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Completion, FinishReason, Problem, Trajectory, Verdict
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.refine import RolloutRunner, stable_seed, summarize, to_sample

SAMPLING = SamplingParams(max_new_tokens=4)


def completion(text: str = "ok", finish_reason: Any = "stop", ids: Sequence[int] | None = None) -> Completion:
    return Completion(token_ids=tuple([7, 8, 1] if ids is None else ids), text=text, finish_reason=finish_reason)


def trajectory(**changes: Any) -> Trajectory:
    base = Trajectory(
        problem=Problem(id="p", prompt="x", answer="1"),
        y_o=completion("raw", ids=[5, 6, 1]),
        y_o_correct=False,
        solve_prompt_ids=(10,),
        vanilla_prompt_ids=(10, 11),
        y_r=completion("refined"),
        y_r_correct=True,
        refine_prompt_ids=(10, 12),
    )
    return replace(base, **changes)


class Task:
    """Answers are right when they equal the problem's."""

    name, template_dir, epistemic_words = "words", Path(), ()

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        return Verdict(outcome="correct" if response == problem.answer else "wrong")


class Renderer:
    """Prompts whose ids tell where they come from."""

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id),)

    def vanilla(self, problem: Problem) -> tuple[int, ...]:
        return (int(problem.id), 1)

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


# ------------------------------------------------------------------ to_sample

TRUNCATED = completion("cut", "length", [7, 8])
SILENT = completion(" ", "stop", [1])
FAILED = completion("", "abort", [])


@pytest.mark.parametrize(
    ("changes", "method", "response", "teacher", "reason"),
    [
        ({}, {}, (7, 8, 1), (10, 12), None),
        ({}, {"trajectory": "y_o"}, (5, 6, 1), (10, 11), None),
        ({"y_r": None}, {"trajectory": "y_o"}, (5, 6, 1), (10, 11), None),
        *[
            case
            for bad in (TRUNCATED, SILENT, FAILED, None)
            for case in (
                ({"y_r": bad}, {"on_bad_refinement": "use_y_o"}, (5, 6, 1), (10, 11), "bad_y_r_replaced"),
                ({"y_r": bad}, {"on_bad_refinement": "drop"}, None, None, "bad_y_r_dropped"),
            )
        ],
        ({"y_r": TRUNCATED}, {"on_bad_refinement": "keep"}, (7, 8), (10, 12), "bad_y_r_kept"),
        ({"y_r": SILENT}, {"on_bad_refinement": "keep"}, (1,), (10, 12), "bad_y_r_kept"),
        ({"y_r": FAILED}, {"on_bad_refinement": "keep"}, None, None, "bad_y_r_dropped"),
        ({"y_o": FAILED, "y_r": None}, {"on_bad_refinement": "use_y_o"}, None, None, "bad_y_o"),
        ({"y_o": FAILED, "y_r": None}, {"trajectory": "y_o"}, None, None, "bad_y_o"),
        ({"y_o": TRUNCATED}, {"trajectory": "y_o"}, (7, 8), (10, 11), None),
        ({}, {"trajectory_filter": "fail"}, (7, 8, 1), (10, 12), None),
        ({}, {"trajectory_filter": "succ"}, None, None, "filtered"),
        ({}, {"trajectory_filter": "fail_to_succ"}, (7, 8, 1), (10, 12), None),
        ({"y_r_correct": False}, {"trajectory_filter": "fail_to_succ"}, None, None, "filtered"),
        ({"y_o_correct": True}, {"trajectory_filter": "fail"}, None, None, "filtered"),
        ({"y_o_correct": True}, {"trajectory_filter": "succ"}, (7, 8, 1), (10, 12), None),
        ({"y_o_correct": None}, {"trajectory_filter": "fail"}, None, None, "filtered"),
    ],
)
def test_what_is_trained_on(changes: Any, method: Any, response: Any, teacher: Any, reason: str | None) -> None:
    decision = to_sample(trajectory(**changes), MethodConfig(**method))
    assert decision.reason == reason
    if response is None:
        assert decision.sample is None
        return
    assert decision.sample is not None
    assert (decision.sample.response_ids, decision.sample.teacher_prompt_ids) == (response, teacher)
    assert decision.sample.student_prompt_ids == (10,) and decision.sample.problem_id == "p"


def test_summary_counts_what_is_there_and_leaves_out_what_is_not() -> None:
    batch = [
        trajectory(),
        trajectory(y_o_correct=True, refine_cut_tokens=3),
        trajectory(y_r=TRUNCATED, y_r_correct=False),
        trajectory(y_o=FAILED, y_o_correct=None, y_r=None, y_r_correct=None, refine_prompt_ids=()),
    ]
    metrics = summarize(batch)
    assert metrics["rollout/y_o_pass"] == pytest.approx(1 / 3) and metrics["rollout/y_r_pass"] == pytest.approx(2 / 3)
    assert metrics["rollout/y_o_failed"] == 0.25 and metrics["rollout/y_r_truncated"] == pytest.approx(1 / 3)
    outcomes = {name: metrics[f"rollout/{name}"] for name in ("pass_pass", "pass_fail", "fail_pass", "fail_fail")}
    assert outcomes == {"pass_pass": 1, "pass_fail": 0, "fail_pass": 1, "fail_fail": 1}
    assert metrics["rollout/y_r_tokens"] == pytest.approx(8 / 3) and metrics["rollout/y_r_tokens_incorrect"] == 2
    assert metrics["rollout/refine_cut"] == pytest.approx(1 / 3)
    alone = summarize([trajectory(y_r=None, y_r_correct=None, refine_prompt_ids=())])
    assert not [tag for tag in alone if "y_r" in tag or "pass_" in tag or "refine" in tag]
