"""What a run in the sandbox says about a program."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

from megatron_trd.tasks.sandbox import Finished

Mode = Literal["faithful", "official"]
TestVerdict = Literal[
    "pass", "wrong", "runtime_error", "timeout", "memory", "output_limit", "compile_error", "sandbox_error"
]

_CPU_TIME_OVER = 128 + signal.SIGXCPU
_DETAIL_CHARS = 200
_SYNTAX = re.compile(r"(SyntaxError|IndentationError|TabError)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """How a program did on one test."""

    __test__ = False  # pytest: not a class of tests

    verdict: TestVerdict
    """`sandbox_error`: the sandbox failed, which says nothing about the program."""
    detail: str = ""
    """The last line of its error."""
    seconds: float = 0.0


def failure_of(finished: Finished) -> TestResult | None:
    """Return the failure of a run, None if the program ended by itself with status 0."""
    lines = finished.stderr.decode(errors="replace").strip().splitlines() or [""]
    detail, seconds = lines[-1][:_DETAIL_CHARS], finished.seconds

    def failed(verdict: TestVerdict, detail: str = detail) -> TestResult:
        return TestResult(verdict=verdict, detail=detail, seconds=seconds)

    match finished.ending:
        case "failed":
            return failed("sandbox_error", finished.error)
        case "timeout" | "memory" | "output_limit":
            return failed(finished.ending, "")
    if finished.status == 0:
        return None
    if finished.status == _CPU_TIME_OVER:
        return failed("timeout")
    return failed(verdict_of_error(detail, raised="Traceback (most" in lines[0]), detail or f"status {finished.status}")


def verdict_of_error(error: str, *, raised: bool = True) -> TestVerdict:
    """Return the verdict on a program that ended with this line; syntax errors count as its own where not `raised`."""
    if error.startswith("MemoryError"):
        return "memory"
    return "compile_error" if not raised and _SYNTAX.match(error) else "runtime_error"
