"""Grade a response: extract its program, run it on the tests, judge each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_trd.records import FinishReason, Verdict
from megatron_trd.tasks.code_problems.calls import run_calls, with_setup
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.compare import same_output
from megatron_trd.tasks.code_problems.extract import extract_as_livecodebench, extract_program
from megatron_trd.tasks.code_problems.livecodebench import run_wrapped
from megatron_trd.tasks.code_problems.outcome import Mode, TestResult, TestVerdict, failure_of
from megatron_trd.tasks.sandbox import Finished, Job, Sandbox, shared_sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult:
    """How a program did on the tests of a problem."""

    mode: Mode
    """How it was run."""
    num_tests: int
    results: tuple[TestResult, ...]
    """Of the tests that were run, in their order; fewer than `num_tests` after a failure that ended it."""

    @property
    def verdicts(self) -> tuple[TestVerdict, ...]:
        """Of the tests that were run."""
        return tuple(result.verdict for result in self.results)

    @property
    def passed(self) -> bool:
        """Whether every test was run and passed; with no test at all, too."""
        return self.verdicts == ("pass",) * self.num_tests

    @property
    def ungraded(self) -> bool:
        """Whether the sandbox failed, so that nobody knows."""
        return "sandbox_error" in self.verdicts

    def describe(self) -> str:
        """Say which test failed first, and how."""
        for number, result in enumerate(self.results, start=1):
            if result.verdict != "pass":
                counts = Counter(self.verdicts)
                passed = f"{counts['pass']} of {self.num_tests} tests passed"
                return f"test {number}: {result.verdict} {result.detail}".rstrip() + f"; {passed}"
        return f"{len(self.results)} of {self.num_tests} tests passed"


def grade_program(
    response: str,
    tests: CodeTests,
    *,
    finish_reason: FinishReason,
    sandbox: Sandbox | None = None,
    mode: Mode = "faithful",
    stop_at_failure: bool = True,
) -> Verdict:
    """Grade a response whose last code block is a program. Safe to call from any thread.

    Args:
        response: decoded text, thinking included.
        tests: of the problem; one with several right outputs comes to no verdict.
        finish_reason: why generation ended; `length` and `abort` make a missing program `truncated`.
        sandbox: where it is run; None = the one that this process shares.
        mode: see `judge_program`; `official` also takes LiveCodeBench's idea of what the program is.
        stop_at_failure: run no further test after one failed; the verdict is the same.

    Raises:
        SandboxError: this machine has no working sandbox.
    """
    sandbox = sandbox or shared_sandbox()
    if mode == "official":
        program, broken_off = extract_as_livecodebench(response), False
    else:
        program, broken_off = extract_program(response)
    if program is None:
        truncated = broken_off or finish_reason in ("length", "abort")
        return Verdict(outcome="truncated" if truncated else "no_answer")
    if tests.special_judge:
        return Verdict(outcome="grader_error", extracted=program, error="several outputs are right: not scored")
    try:
        result = judge_program(program, tests, sandbox=sandbox, mode=mode, stop_at_failure=stop_at_failure)
    except ValueError as error:  # of the tests; the sandbox was tried out before
        return Verdict(outcome="grader_error", extracted=program, error=str(error))
    if result.passed:
        return Verdict(outcome="correct", extracted=program)
    return Verdict(outcome="grader_error" if result.ungraded else "wrong", extracted=program, error=result.describe())


def judge_program(
    program: str, tests: CodeTests, *, sandbox: Sandbox, mode: Mode = "faithful", stop_at_failure: bool = True
) -> ProgramResult:
    """Run a program on tests. Expected outputs never enter the sandbox.

    Args:
        program: Python source.
        tests: of the problem.
        sandbox: where it is run.
        mode: `faithful`: one process for each test that reads and prints; functions are called one test after the
            other in one process. `official`: as LiveCodeBench's published harness does it, with its oddities.
        stop_at_failure: run no further test after one failed.

    Raises:
        ValueError: a test's input or output is no Python literal.
    """
    if tests.kind == "call":
        results = run_calls(program, tests, sandbox=sandbox, mode=mode, stop_at_failure=stop_at_failure)
    elif mode == "official":
        results = run_wrapped(program, tests, sandbox=sandbox)
    else:
        results = _run_processes(program, tests, sandbox=sandbox, stop_at_failure=stop_at_failure)
    return ProgramResult(mode=mode, num_tests=len(tests.inputs), results=tuple(results))


def _run_processes(program: str, tests: CodeTests, *, sandbox: Sandbox, stop_at_failure: bool) -> list[TestResult]:
    source = with_setup(tests.setup, program)
    jobs = [
        Job(
            files={"main.py": source},
            stdin=text.encode(),
            timeout_s=tests.timeout_s,
            output_kib=len(expected) * 4 // 1024,
        )
        for text, expected in zip(tests.inputs, tests.outputs, strict=True)
    ]
    judged: list[TestResult] = []

    def failed(finished: Finished) -> bool:
        return stop_at_failure and judged[-1].verdict != "pass"

    for finished in sandbox.run_all(jobs, stop=failed):
        judged.append(_judge_output(tests.outputs[len(judged)], finished))
    return judged


def _judge_output(expected: str, finished: Finished) -> TestResult:
    if (failure := failure_of(finished)) is not None:
        return failure
    equal = same_output(expected, finished.stdout.decode(errors="replace"))
    return TestResult(verdict="pass" if equal else "wrong", seconds=finished.seconds)
