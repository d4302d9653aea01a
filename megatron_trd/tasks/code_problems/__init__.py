"""Programming problems: run a program in a sandbox on tests and judge what it prints or returns."""

from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.grading import ProgramResult, grade_program, judge_program
from megatron_trd.tasks.code_problems.outcome import Mode, TestResult, TestVerdict

__all__ = ["CodeTests", "Mode", "ProgramResult", "TestResult", "TestVerdict", "grade_program", "judge_program"]
