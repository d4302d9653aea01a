"""The nouns every room shares. Plain data: no behaviour beyond derived properties, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
Outcome = Literal["correct", "wrong", "no_answer", "truncated", "grader_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem x, with what its verifier and a privileged teacher need."""

    id: str
    """Unique within its task; trajectories are matched to problems by it."""
    prompt: str
    """The problem statement x as the solve template receives it."""
    answer: str
    """What the verifier compares a response with."""
    reference_solution: str | None = None
    """y*, shown only to an OPSD teacher. None when the corpus has none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier found in one response."""

    outcome: Outcome
    """`truncated`: cut off before an answer; `grader_error`: the grading itself failed, so nobody knows."""
    extracted: str | None = None
    """The answer that was compared."""
    error: str | None = None
    """What went wrong: in the grading of a `grader_error`, in the program of a `wrong` answer that was run."""

    @property
    def correct(self) -> bool:
        """Whether the response counts as right; a `grader_error` does not."""
        return self.outcome == "correct"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens of a response that one version of the weights sampled."""

    version: str
    start: int
    """First token."""
    end: int
    """One behind the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response: what the server returned, or what several did that went on where the other broke off."""

    token_ids: tuple[int, ...]
    """The sampled ids, with the end-of-turn token when it was sampled. Never re-tokenised."""
    text: str
    """Decoded response without special tokens; for verifiers and people, never for training."""
    finish_reason: FinishReason
    """`stop`: the end-of-turn token was sampled; `length`: budget spent; `abort`: failed or cut off."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each id at the sampling temperature, before top-k/top-p. Empty if not asked."""
    weight_spans: tuple[VersionSpan, ...] = ()
    """Which weights sampled which tokens, in order; more than one span if the weights changed on the way."""
    error: str | None = None
    """Why an `abort` happened."""

    @property
    def weight_versions(self) -> tuple[str, ...]:
        """Weight versions that produced it, in order, each once."""
        return tuple(dict.fromkeys(span.version for span in self.weight_spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Stage 1 (y_o), its refinement (y_r) and the exact contexts that produced them."""

    problem: Problem
    y_o: Completion
    y_o_correct: bool | None
    """Verdict on y_o; None when it could not be graded."""
    solve_prompt_ids: tuple[int, ...]
    """The plain prompt: y_o was sampled from it and the student is trained on it."""
    vanilla_prompt_ids: tuple[int, ...]
    """The teacher's context along y_o: the plain prompt in OPD, x and y* in OPSD."""
    y_r: Completion | None = None
    """None when no refinement was asked for."""
    y_r_correct: bool | None = None
    refine_prompt_ids: tuple[int, ...] = ()
    """The context y_r was sampled from and the teacher is conditioned on in the loss."""
    refine_cut_tokens: int = 0
    """Tokens of y_o (then y*) cut from the refinement prompt to keep it in budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response in two contexts: what one sequence of the loss needs and nothing else."""

    problem_id: str
    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    y_o_correct: bool | None = None
    """Stage-1 verdict; splits D_correct from D_incorrect."""
