"""What becomes of each kind of trajectory: filters, bad refinements, reasoning blocks, kept prefixes."""

from __future__ import annotations

import itertools
import typing
from dataclasses import replace
from typing import Any

import pytest

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import KeptPrefix, Outcome, Reasoning, Verdict
from megatron_trd.rollout.to_sample import passes, to_sample
from scripted_rollouts import completion, trajectory

GIVEN_UP = Verdict(outcome="grader_error", error="timed out")
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
        ({"y_o_verdict": GIVEN_UP}, {"trajectory_filter": "fail"}, None, None, "filtered"),
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


def test_filters_on_every_pair_of_verdicts() -> None:
    outcomes: tuple[Outcome | None, ...] = (*typing.get_args(Outcome), None)
    assert len(outcomes) == 6
    counts = dict.fromkeys(("full", "fail", "succ", "fail_to_succ"), 0)
    is_fail = {"wrong", "no_answer", "truncated"}
    for was, became in itertools.product(outcomes, outcomes):
        made = trajectory(y_o_verdict=was and Verdict(outcome=was), y_r_verdict=became and Verdict(outcome=became))
        expected = {
            "full": True,
            "fail": was in is_fail,
            "succ": was == "correct",
            "fail_to_succ": was in is_fail and became == "correct",
        }
        for name, lets_through in expected.items():
            assert passes(made, name) is lets_through, (name, was, became)
            decision = to_sample(made, MethodConfig(trajectory_filter=name))  # type: ignore[arg-type]
            assert (decision.reason == "filtered") is not lets_through
            counts[name] += lets_through
        sample = to_sample(made, MethodConfig()).sample
        assert sample is not None
        assert sample.y_o_correct is {"correct": True, "grader_error": None, None: None}.get(was, False)
    assert counts == {"full": 36, "fail": 18, "succ": 6, "fail_to_succ": 3}


# ------------------------------------------------------------------ reasoning and kept prefixes

Y_R = completion("think done", ids=[50, 51, 52, 60, 61, 1])
BLOCK = Reasoning(num_tokens=3, student_suffix_ids=(70,), teacher_suffix_ids=(80, 81))


def kept(num_tokens: int) -> KeptPrefix:
    return KeptPrefix(num_tokens=num_tokens, num_steps=1, total_steps=2, probes=())


@pytest.mark.parametrize(
    ("num_kept", "method", "student", "teacher", "response"),
    [
        (0, {"refiner_reasoning": "keep"}, (10,), (10, 12), (50, 51, 52, 60, 61, 1)),
        (0, {}, (10, 70), (10, 12, 50, 51, 52), (60, 61, 1)),
        (0, {"refiner_reasoning": "context"}, (10, 70), (10, 12, 50, 51, 52), (60, 61, 1)),
        (0, {"refiner_reasoning": "drop"}, (10, 70), (10, 12, 80, 81), (60, 61, 1)),
        # with a kept prefix that ends in the block, and one that reaches beyond it
        (2, {}, (10, 70), (10, 12, 50, 51, 52), (60, 61, 1)),
        (2, {"prefix_loss": "rewritten"}, (10, 70), (10, 12, 50, 51, 52), (60, 61, 1)),
        (4, {"prefix_loss": "rewritten"}, (10, 70, 60), (10, 12, 50, 51, 52, 60), (61, 1)),
        (
            4,
            {"prefix_loss": "rewritten", "refiner_reasoning": "drop"},
            (10, 70, 60),
            (10, 12, 80, 81, 60),
            (61, 1),
        ),
        (
            2,
            {"prefix_loss": "rewritten", "refiner_reasoning": "keep"},
            (10, 50, 51),
            (10, 12, 50, 51),
            (52, 60, 61, 1),
        ),
    ],
)
def test_where_the_block_and_the_kept_prefix_go(
    num_kept: int, method: Any, student: Any, teacher: Any, response: Any
) -> None:
    made = trajectory(y_r=Y_R, y_r_reasoning=BLOCK, kept=kept(num_kept) if num_kept else None)
    sample = to_sample(made, MethodConfig(**method)).sample
    assert sample is not None
    assert (sample.student_prompt_ids, sample.teacher_prompt_ids, sample.response_ids) == (student, teacher, response)


def test_a_kept_prefix_is_trained_on_unless_told_otherwise() -> None:
    made = trajectory(y_r=Y_R, kept=kept(2))
    whole, rewritten = (to_sample(made, MethodConfig(prefix_loss=loss)).sample for loss in ("whole", "rewritten"))
    assert whole is not None and rewritten is not None
    assert (whole.student_prompt_ids, whole.response_ids) == ((10,), Y_R.token_ids)
    assert (rewritten.student_prompt_ids, rewritten.teacher_prompt_ids) == ((10, 50, 51), (10, 12, 50, 51))
    assert rewritten.response_ids == (52, 60, 61, 1)


@pytest.mark.parametrize("mode", ["auto", "keep", "context", "drop"])
def test_a_block_that_never_closes_is_a_bad_refinement(mode: Any) -> None:
    made = trajectory(y_r=Y_R, y_r_reasoning=replace(BLOCK, num_tokens=6))
    for policy, reason in (("use_y_o", "bad_y_r_replaced"), ("drop", "bad_y_r_dropped")):
        decision = to_sample(made, MethodConfig(refiner_reasoning=mode, on_bad_refinement=policy))  # type: ignore[arg-type]
        assert decision.reason == reason
    kept_anyway = to_sample(made, MethodConfig(refiner_reasoning=mode, on_bad_refinement="keep"))
    if mode == "keep":
        assert kept_anyway.sample is not None and kept_anyway.sample.response_ids == Y_R.token_ids
    else:
        assert kept_anyway.sample is None and kept_anyway.reason == "bad_y_r_dropped"
