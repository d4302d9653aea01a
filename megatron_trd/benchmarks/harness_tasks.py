"""Code benchmarks whose published harness says how a program is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_trd.config.schema import DataConfig
from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.evalplus import evaluation_of, judge_plus
from megatron_trd.tasks.code_problems.extract import extract_program
from megatron_trd.tasks.code_problems.grading import grade_program
from megatron_trd.tasks.code_problems.outcome import Mode
from megatron_trd.tasks.code_problems.task import CodeTask


@dataclass(frozen=True, slots=True, kw_only=True)
class PlusVerdict(Verdict):
    """A verdict with EvalPlus' account of it."""

    evalplus: Mapping[str, Any] | None = None
    """Statuses on base and additional tests, and the inputs that failed first; None where no program was judged."""


class EvalPlusTask(CodeTask):
    """HumanEval+ and MBPP+: base and additional tests are judged apart, and both must pass."""

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> PlusVerdict:
        """Run the response's program on both kinds of tests."""
        tests = CodeTests.from_json(self.tests(problem))
        program, broken_off = extract_program(response)
        if program is None:
            truncated = broken_off or finish_reason in ("length", "abort")
            return PlusVerdict(outcome="truncated" if truncated else "no_answer")
        result = judge_plus(program, tests, sandbox=self._sandbox())
        record = {
            "task_id": problem.id.partition("/")[2],
            "base_input": tests.inputs[: tests.num_base],
            "plus_input": tests.inputs[tests.num_base :],
        }
        try:
            account = evaluation_of(record, program, result)
        except ValueError as error:
            return PlusVerdict(outcome="grader_error", extracted=program, error=str(error))
        del account["solution"]
        return PlusVerdict(
            outcome="correct" if result.passed else "wrong",
            extracted=program,
            error=None if result.passed else f"base: {result.base.describe()}; plus: {result.plus.describe()}",
            evalplus=account,
        )


class LiveCodeBenchTask(CodeTask):
    """LiveCodeBench, judged as real programs or as its published harness does it."""

    def __init__(self, data: DataConfig, mode: Mode) -> None:
        """Remember where the problems are and how programs are run."""
        super().__init__(data)
        self._mode = mode

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Run the response's program on the problem's tests."""
        tests = CodeTests.from_json(self.tests(problem))
        return grade_program(response, tests, finish_reason=finish_reason, sandbox=self._sandbox(), mode=self._mode)
