"""What becomes of a trajectory: which response is trained on, in which two contexts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Completion, Sample, Trajectory
from megatron_trd.rollout.selection import is_good


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a trajectory."""

    sample: Sample | None
    reason: str | None = None
    """Set when something other than the plain good case happened; counted as `rollout/<reason>`."""


def to_sample(trajectory: Trajectory, method: MethodConfig) -> Decision:
    """Choose the response and both contexts, or say why there is none.

    Reasons: `filtered` (--trajectory-filter), `bad_y_o` (failed or without tokens), `bad_y_r_kept`,
    `bad_y_r_dropped` and `bad_y_r_replaced` (--on-bad-refinement; `selection.is_good` says what a good one is).
    """
    if not passes(trajectory, method.trajectory_filter):
        return Decision(sample=None, reason="filtered")
    if trajectory.y_o.finish_reason == "abort" or not trajectory.y_o.token_ids:
        return Decision(sample=None, reason="bad_y_o")
    if method.trajectory == "y_o":
        return Decision(sample=_along_y_o(trajectory))
    y_r = trajectory.y_r
    if y_r is not None and is_good(y_r, trajectory.y_r_reasoning):
        return Decision(sample=_along_y_r(trajectory, y_r, method))
    if method.on_bad_refinement == "use_y_o":
        return Decision(sample=_along_y_o(trajectory), reason="bad_y_r_replaced")
    if method.on_bad_refinement == "keep" and y_r is not None:
        sample = _along_y_r(trajectory, y_r, method)
        if sample.response_ids:
            return Decision(sample=sample, reason="bad_y_r_kept")
    return Decision(sample=None, reason="bad_y_r_dropped")


def passes(trajectory: Trajectory, trajectory_filter: str) -> bool:
    """Tell whether a filter lets a trajectory through.

    | filter | y_o | y_r |
    |---|---|---|
    | `full` | any | any |
    | `succ` | correct | any |
    | `fail` | wrong, no_answer or truncated | any |
    | `fail_to_succ` | wrong, no_answer or truncated | correct |

    Where nobody knows, because a request failed (no verdict) or its grading did (`grader_error`), only `full` does.
    """
    match trajectory_filter:
        case "fail":
            return trajectory.y_o_correct is False
        case "succ":
            return trajectory.y_o_correct is True
        case "fail_to_succ":
            return trajectory.y_o_correct is False and trajectory.y_r_correct is True
        case _:
            return True


def _along_y_o(trajectory: Trajectory) -> Sample:
    return Sample(
        problem_id=trajectory.problem.id,
        student_prompt_ids=trajectory.solve_prompt_ids,
        teacher_prompt_ids=trajectory.vanilla_prompt_ids,
        response_ids=trajectory.y_o.token_ids,
        y_o_correct=trajectory.y_o_correct,
    )


def _along_y_r(trajectory: Trajectory, y_r: Completion, method: MethodConfig) -> Sample:
    """Split y_r's ids into reasoning | context of both | response; the ids themselves stay as they were sampled."""
    ids, reasoning, kept = y_r.token_ids, trajectory.y_r_reasoning, trajectory.kept
    student, teacher, begin = trajectory.solve_prompt_ids, trajectory.refine_prompt_ids, 0
    if reasoning is not None and method.refiner_reasoning != "keep":
        begin = reasoning.num_tokens
        student += reasoning.student_suffix_ids
        teacher += reasoning.teacher_suffix_ids if method.refiner_reasoning == "drop" else ids[:begin]
    start = max(begin, kept.num_tokens) if kept is not None and method.prefix_loss == "rewritten" else begin
    return Sample(
        problem_id=trajectory.problem.id,
        student_prompt_ids=student + ids[begin:start],
        teacher_prompt_ids=teacher + ids[begin:start],
        response_ids=ids[start:],
        y_o_correct=trajectory.y_o_correct,
    )
