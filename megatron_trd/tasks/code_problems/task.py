"""Programming problems that a sandbox decides."""

from __future__ import annotations

from pathlib import Path

from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.grading import grade_program
from megatron_trd.tasks.corpus import CorpusTask, Row
from megatron_trd.tasks.sandbox import Sandbox, shared_sandbox


class CodeTask(CorpusTask):
    """Problems whose program must pass its tests. The tests stay in the files until a program is graded."""

    name = "code"
    template_dir = Path(__file__).parents[1] / "templates" / "code"

    def check_grading(self) -> None:
        """Try the sandbox out."""
        self._sandbox()

    def accept(self, row: Row) -> None:
        """Refuse a problem without usable tests."""
        if row.tests is None:
            raise ValueError("tests are missing; remove the line")
        CodeTests.from_json(row.tests)

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Run the response's program on the problem's tests."""
        tests = CodeTests.from_json(self.tests(problem))
        return grade_program(response, tests, finish_reason=finish_reason, sandbox=self._sandbox())

    def _sandbox(self) -> Sandbox:
        return shared_sandbox(python=self.data.code_python, unsafe=self.data.unsafe_code_execution)
