"""The verifier of final answers."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, get_args

from megatron_trd.records import Verdict
from megatron_trd.tasks.math_problems.compare import equal_answers
from megatron_trd.tasks.math_problems.extract import after_thinking, last_box, open_boxes
from megatron_trd.tasks.math_problems.pool import GraderError, MathWorkerPool
from megatron_trd.tasks.math_problems.strict_string import strict_box, strictly_equal

Profile = Literal["default", "strict-string", "amo"]
AmoAnswerType = Literal["number", "set", "variable"]


def verify_answer(
    response: str,
    gold: str,
    *,
    profile: Profile = "default",
    finish_reason: str | None = None,
    amo_answer_type: AmoAnswerType = "number",
    amo_points: Sequence[Mapping[str, int]] = (),
    pool: MathWorkerPool | None = None,
) -> Verdict:
    r"""Grade a response against a reference answer. Safe to call from any thread.

    Args:
        response: decoded text, thinking included.
        gold: reference answer in LaTeX or plain text, with or without its box.
        profile: `default`: mathematical equality of the last balanced `\boxed{}` after the thinking.
            `strict-string`: the string rule of published scores. `amo`: AMO-Bench's parser.
        finish_reason: why generation ended; `length` and `abort` make a missing answer `truncated`.
        amo_answer_type: how AMO-Bench classifies the problem.
        amo_points: values of the variables where a `variable` answer of AMO-Bench is compared.
        pool: worker processes for algebra; None shares one pool of two among all callers of this process.

    Raises:
        ValueError: an unknown profile or AMO answer type, or Math-Verify is missing.
    """
    if profile not in get_args(Profile):
        raise ValueError(f"profile {profile}: unknown; use one of {', '.join(get_args(Profile))}")
    if amo_answer_type not in get_args(AmoAnswerType):
        raise ValueError(
            f"amo_answer_type {amo_answer_type}: has no parser; use one of {', '.join(get_args(AmoAnswerType))}"
        )
    answer = _extract(response, profile)
    if not answer:
        thinking = profile != "strict-string" and after_thinking(response) is None
        return Verdict(outcome="truncated" if thinking or finish_reason in ("length", "abort") else "no_answer")
    try:
        if profile == "strict-string":
            equal = strictly_equal(gold, answer)
        elif profile == "amo":
            request = {"gold": gold, "answer": answer, "answer_type": amo_answer_type, "points": list(amo_points)}
            equal = (pool or _shared_pool()).ask(rule="amo", **request)
        else:
            equal = _equal(open_boxes(gold), answer, pool)
    except GraderError as error:
        return Verdict(outcome="grader_error", extracted=answer, error=str(error))
    return Verdict(outcome="correct" if equal else "wrong", extracted=answer)


def _extract(response: str, profile: Profile) -> str | None:
    if profile == "strict-string":
        return strict_box(response)
    text = after_thinking(response)
    return last_box(text) if text is not None and profile == "default" else text


def _equal(gold: str, answer: str, pool: MathWorkerPool | None) -> bool:
    verdict = equal_answers(gold, answer)
    if verdict is None:
        return (pool or _shared_pool()).ask(rule="expressions", gold=gold, answer=answer)
    return verdict


_shared_lock = threading.Lock()


def _shared_pool() -> MathWorkerPool:
    with _shared_lock:
        return _pool_of(os.getpid())  # a forked child must not talk to the workers of its parent


@lru_cache(maxsize=1)
def _pool_of(process_id: int) -> MathWorkerPool:
    pool = MathWorkerPool()
    atexit.register(lambda: pool.close() if os.getpid() == process_id else None)
    return pool
