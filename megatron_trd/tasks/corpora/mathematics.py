"""Records of mathematics corpora as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_trd.records import Problem
from megatron_trd.tasks.corpora.records import Record, SkippedRecord, first_of, kept_metadata, row_id
from megatron_trd.tasks.corpus import Row, squeezed
from megatron_trd.tasks.math_problems.extract import last_box, open_boxes

_PROMPT = ("problem", "question", "prompt")
_ANSWER = ("answer", "final_answer")
_SOLUTION = ("solution", "reference_solution")
_ID = ("id", "unique_id", "question_id", "problem_idx")
_KEPT = ("difficulty", "level", "type", "subject", "problem_type", "year", "url")
_AMO_POINTS: Mapping[int, list[dict[str, int]]] = {
    5: [{"n": n} for n in range(1, 21)],
    37: [{"a": a, "b": a + 1, "c": a + 2} for a in range(2, 19)],
}
"""Where the parser of AMO-Bench compares an answer that is a formula."""


def math_row(record: Record, prefix: str, **metadata: Any) -> Row:
    r"""Return the row of a record with a statement and an answer.

    Without an answer of its own it takes the last box of its solution; a solution that is nothing but the answer is
    no reference solution.

    Raises:
        ValueError: statement or answer is missing.
    """
    prompt, answer, solution = (first_of(record, names) for names in (_PROMPT, _ANSWER, _SOLUTION))
    if answer is None and solution is not None:
        answer = last_box(str(solution)) or solution
    for what, value, names in (("statement", prompt, _PROMPT), ("answer", answer, _ANSWER)):
        if value is None:
            raise ValueError(f"has no {what}; fill in {' or '.join(names)}, or remove the record")
    answer, solution = str(answer).strip(), str(solution or "").strip()
    is_only_the_answer = squeezed(open_boxes(solution)).strip("$") == squeezed(open_boxes(answer)).strip("$")
    return Row(
        task="math",
        problem=Problem(
            id=row_id(prefix, record, _ID),
            prompt=str(prompt).strip(),
            answer=answer,
            reference_solution=None if is_only_the_answer else solution or None,
            metadata=kept_metadata(prefix, record, _KEPT) | metadata,
        ),
    )


def amo_row(record: Record, prefix: str) -> Row:
    """Return the row of an AMO-Bench record.

    Raises:
        SkippedRecord: its answer is a description, which no parser grades.
    """
    answer_type, number = record.fields.get("answer_type"), int(record.fields["question_id"])
    if answer_type == "description":
        raise SkippedRecord("the answer is a description, which a parser cannot grade")
    if answer_type not in ("number", "set", "variable"):
        raise ValueError(f"answer_type {answer_type} is unknown; give number, set or variable")
    if answer_type != "variable":
        return math_row(record, prefix, amo_answer_type=answer_type)
    if number not in _AMO_POINTS:
        raise ValueError(f"no points are known for question {number}; only for 5 and 37")
    return math_row(record, prefix, amo_answer_type=answer_type, amo_points=_AMO_POINTS[number])
