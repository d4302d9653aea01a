"""The nouns every room shares. Plain data: no behaviour beyond derived properties, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
Outcome = Literal["correct", "wrong", "no_answer", "truncated", "grader_error"]
SelectionReason = Literal["first", "first_verified", "shortest_verified", "none_verified"]


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

    @property
    def passed(self) -> bool | None:
        """Whether the response is right; None for a `grader_error`: nobody knows."""
        return None if self.outcome == "grader_error" else self.correct


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
class Candidate:
    """One refinement that might become y_r."""

    completion: Completion
    verdict: Verdict | None
    """None when the request failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which of several refinements became y_r."""

    chosen: int
    """Its place in the order of the seeds."""
    reason: SelectionReason
    rejected: tuple[Candidate, ...]
    """The others, in the order of their seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixProbe:
    """Continuations that the student sampled from one prefix of y_o."""

    num_steps: int
    num_tokens: int
    verdicts: tuple[Verdict | None, ...]
    """On prefix and continuation together; None where the request failed."""

    @property
    def num_correct(self) -> int:
        """Continuations that reached the answer."""
        return sum(verdict is not None and verdict.correct for verdict in self.verdicts)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPrefix:
    """The part of a wrong y_o that y_r begins with, and how it was found."""

    num_tokens: int
    """Tokens of y_o that are the first tokens of y_r."""
    num_steps: int
    total_steps: int
    """Steps of the whole y_o."""
    probes: tuple[PrefixProbe, ...]
    """In the order they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """The reasoning block at the start of a y_r, and what stands in its place where it is left out."""

    num_tokens: int
    """Up to the end of the block and of the white space behind it; all of y_r when the block never closes."""
    student_suffix_ids: tuple[int, ...]
    """An empty block as the chat template writes it, to follow the plain prompt; () where that has one."""
    teacher_suffix_ids: tuple[int, ...]
    """The same for the refinement prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Stage 1 (y_o), its refinement (y_r) and the exact contexts that produced them."""

    problem: Problem
    y_o: Completion
    y_o_verdict: Verdict | None
    """None when the request failed."""
    solve_prompt_ids: tuple[int, ...]
    """The plain prompt: y_o was sampled from it and the student is trained on it."""
    vanilla_prompt_ids: tuple[int, ...]
    """The teacher's context along y_o: the plain prompt in OPD, x and y* in OPSD."""
    y_r: Completion | None = None
    """None when no refinement was asked for. Behind a kept start of y_o it is whole: y_o's ids, then the refiner's."""
    y_r_verdict: Verdict | None = None
    refine_prompt_ids: tuple[int, ...] = ()
    """The context y_r was sampled from and the teacher is conditioned on in the loss."""
    refine_cut_tokens: int = 0
    """Tokens of y_o (then y*) cut from the refinement prompt to keep it in budget."""
    vanilla_cut_tokens: int = 0
    """Tokens of y* cut from the teacher's context along y_o."""
    y_r_reasoning: Reasoning | None = None
    """None where y_r has no reasoning block."""
    kept: KeptPrefix | None = None
    """None where y_r was written from its start."""
    selection: Selection | None = None
    """None where one refinement was asked for."""

    @property
    def y_o_correct(self) -> bool | None:
        """Whether y_o is right; None when nobody knows: it failed, or its grading did."""
        return None if self.y_o_verdict is None else self.y_o_verdict.passed

    @property
    def y_r_correct(self) -> bool | None:
        """The same of y_r; None also where there is none."""
        return None if self.y_r_verdict is None else self.y_r_verdict.passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response in two contexts: what one sequence of the loss needs and nothing else."""

    problem_id: str
    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    y_o_correct: bool | None = None
    """Stage-1 verdict; splits D_correct from D_incorrect."""
