"""LiveCodeBench's published harness: what it accepts and refuses, oddities included."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from megatron_trd.tasks.code_problems.calls import with_setup
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.compare import same_output_as_livecodebench
from megatron_trd.tasks.code_problems.outcome import TestResult, failure_of
from megatron_trd.tasks.sandbox import Job, Sandbox

_TEST_S, _EXTRA_S = 7, 5
"""The harness kills a process after 7 s for each test and 5 more."""


def run_wrapped(program: str, tests: CodeTests, *, sandbox: Sandbox) -> list[TestResult]:
    """Run a program that reads and prints as one function, test after test, up to the first that fails."""
    files = {
        "main.py": _driver(),
        "program.py": with_setup(tests.setup, program),
        "inputs.json": json.dumps(tests.inputs).encode(),
    }
    num = len(tests.inputs)
    output_kib = sum(map(len, tests.outputs)) * 8 // 1024
    job = Job(files=files, timeout_s=_TEST_S * num + _EXTRA_S, records=num, output_kib=output_kib)
    finished = sandbox.run(job)
    results = []
    for expected, record in zip(tests.outputs, finished.records, strict=False):
        results.append(_judge(expected, record))
        if results[-1].verdict != "pass":
            return results
    if len(results) < num:
        results.append(failure_of(finished) or TestResult(verdict="runtime_error", detail="it ended early"))
    return results


@lru_cache
def _driver() -> bytes:
    return Path(__file__).with_name("livecodebench_driver.py").read_bytes()


def _judge(expected: str, record: bytes) -> TestResult:
    try:
        data = json.loads(record)
    except ValueError:
        return TestResult(verdict="wrong", detail="the program wrote to the descriptor of its driver")
    if not isinstance(data, dict) or not isinstance(data.get("output"), str):
        error = str(data.get("error")) if isinstance(data, dict) else ""
        return TestResult(verdict="timeout" if error.startswith("TimeLimitError") else "runtime_error", detail=error)
    equal = same_output_as_livecodebench(expected, data["output"])
    return TestResult(verdict="pass" if equal else "wrong")
