"""Tests that call a function: many in one process, compared outside of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.compare import (
    NEED_ARGUMENTS,
    same_value,
    same_value_as_evalplus,
    same_value_as_livecodebench,
    tolerances_as_evalplus,
)
from megatron_trd.tasks.code_problems.literal import decode, parse_literal
from megatron_trd.tasks.code_problems.outcome import Mode, TestResult, failure_of, verdict_of_error
from megatron_trd.tasks.sandbox import Finished, Job, Sandbox

_DEATHS = 3
"""A program whose process ended early that many times is not started again."""
_EVALPLUS_MIB = 4096
"""Memory that EvalPlus allows, and some of its own solutions need."""
_UNREADABLE = (ValueError, TypeError, RecursionError)


def run_calls(
    program: str, tests: CodeTests, *, sandbox: Sandbox, mode: Mode, stop_at_failure: bool
) -> list[TestResult]:
    """Call the program's function on every input; after a call that ended the process, the next ones in a new one.

    Raises:
        ValueError: an input or output is no Python literal.
    """
    expected = [parse_literal(text) for text in tests.outputs]
    tolerances = [tests.atol] * len(expected)
    if tests.oracle != "plain":
        tolerances = tolerances_as_evalplus(expected, tests.atol)
    results: list[TestResult] = []
    for _ in range(_DEATHS):
        start = len(results)
        finished = sandbox.run(call_job(program, tests, tests.inputs[start:]))
        for record in finished.records:
            index = len(results)
            if index == len(expected):
                break
            results.append(_judge(tests, index, expected[index], tolerances[index], record, mode))
            if stop_at_failure and results[-1].verdict != "pass":
                return results
        if len(results) == len(expected):
            break
        results.append(_early_end(finished))
        if (
            stop_at_failure
            or len(results) == len(expected)
            or results[-1].verdict in ("sandbox_error", "compile_error")
        ):
            break
    return results


def call_job(program: str, tests: CodeTests, inputs: Sequence[str]) -> Job:
    """Return the job that calls the function on `inputs`."""
    files = {
        "main.py": _driver(),
        "program.py": with_setup(tests.setup, program),
        "function": (tests.function or "").encode(),
        "inputs.json": json.dumps(inputs).encode(),
    }
    output_kib = sum(map(len, tests.outputs)) * 8 // 1024
    memory_mib = 0 if tests.oracle == "plain" else _EVALPLUS_MIB
    return Job(
        files=files, timeout_s=tests.timeout_s, records=len(inputs), output_kib=output_kib, memory_mib=memory_mib
    )


def with_setup(setup: str, program: str) -> bytes:
    """Return the source of a program behind its setup."""
    return (f"{setup}\n{program}" if setup else program).encode(errors="replace")


@lru_cache
def _driver() -> bytes:
    return Path(__file__).with_name("call_driver.py").read_bytes()


def _early_end(finished: Finished) -> TestResult:
    failure = failure_of(finished)
    return failure or TestResult(
        verdict="runtime_error", detail="it ended before it returned", seconds=finished.seconds
    )


def _judge(tests: CodeTests, index: int, expected: Any, atol: float, record: bytes, mode: Mode) -> TestResult:
    """Judge one record. What is not as the driver writes it was written by the program."""
    try:
        data = json.loads(record)
        seconds = float(data["seconds"])
        if "error" in data:
            detail = str(data["error"])
            return TestResult(verdict=verdict_of_error(detail), detail=detail, seconds=seconds)
        returned = decode(data["value"])
        if mode == "official":
            equal = same_value_as_livecodebench(expected, returned)
        elif tests.oracle == "plain":
            equal = same_value(expected, returned, atol)
        else:
            arguments = parse_literal(tests.inputs[index]) if tests.oracle in NEED_ARGUMENTS else ()
            equal = same_value_as_evalplus(tests.oracle, arguments, expected, returned, atol)
    except (*_UNREADABLE, KeyError, ArithmeticError) as error:
        return TestResult(verdict="wrong", detail=f"{type(error).__name__}: {error}"[:200])
    return TestResult(verdict="pass" if equal else "wrong", seconds=seconds)
