"""Verifiers in threads of their own, beside an event loop that goes on talking to servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from megatron_trd.log import get_logger
from megatron_trd.records import Completion, Problem, Verdict
from megatron_trd.tasks.base import Task

logger = get_logger(__name__)
GRADER_ERRORS_ALARM = 0.01


class Graders:
    """A task's verifier in a bounded number of threads of its own: slow grading keeps nothing else waiting."""

    def __init__(self, task: Task) -> None:
        """Start nothing yet; idle threads end with this object."""
        self._task, self._threads = task, ThreadPoolExecutor(thread_name_prefix="grade")

    async def grade(self, problem: Problem, completion: Completion) -> Verdict | None:
        """Return the verdict; None for a failed request. What a verifier raises is a `grader_error` like any other."""
        if completion.finish_reason == "abort":
            return None
        grading = asyncio.get_running_loop().run_in_executor(
            self._threads, self._task.grade, problem, completion.text, completion.finish_reason
        )
        await asyncio.wait([grading])
        if error := grading.exception():
            return Verdict(outcome="grader_error", error=f"{type(error).__name__}: {error}")
        return grading.result()


def warn_of_grader_errors(verdicts: Iterable[tuple[str, Verdict | None]]) -> None:
    """Log one warning with an example if more than 1 % of the verdicts (with the problem's id) are `grader_error`."""
    graded = [(problem_id, verdict) for problem_id, verdict in verdicts if verdict is not None]
    errors = [(problem_id, verdict.error) for problem_id, verdict in graded if verdict.outcome == "grader_error"]
    if len(errors) > GRADER_ERRORS_ALARM * len(graded):
        logger.warning(
            "the grading of %d of %d responses failed: they count as neither right nor wrong; problem %s: %s",
            len(errors),
            len(graded),
            *errors[0],
        )
