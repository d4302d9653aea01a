"""From the records of a corpus to a file of problems, with an account of what was left out and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_trd.records import Problem
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.grading import judge_program
from megatron_trd.tasks.corpora.golds import gold_problem, is_read_as_mathematics
from megatron_trd.tasks.corpora.overlap import MIN_SHARE, NGRAM, StatementIndex
from megatron_trd.tasks.corpora.records import Record, SkippedRecord, read_records
from megatron_trd.tasks.corpora.table import Corpus
from megatron_trd.tasks.corpus import Row, file_sha256, read_rows, squeezed
from megatron_trd.tasks.sandbox import shared_sandbox

FINDINGS = ("malformed-gold", "too-long", "failing-solution", "duplicate", "overlap")
"""What is found in a problem that can be read; it is left out unless `keep` says otherwise."""


@dataclass(slots=True)
class Account:
    """What became of the records."""

    num_records: int = 0
    left_out: list[dict[str, str]] = field(default_factory=list)
    kept_anyway: list[dict[str, str]] = field(default_factory=list)


def prepare(
    name: str,
    corpus: Corpus,
    sources: Sequence[Path],
    output: Path,
    *,
    prefix: str,
    against: Sequence[Path] = (),
    keep: Collection[str] = (),
    too_long: Callable[[Problem], str] | None = None,
    check_solutions: bool = False,
) -> dict[str, Any]:
    """Write the problems of a corpus to `output` and the account beside it; return the account.

    Args:
        prefix: start of every id, and the `source` in the metadata.
        against: files of problems that must have none in common with this one.
        keep: of `FINDINGS`, those that are reported without leaving the problem out.
        too_long: says why a problem's prompt is too long; "" if it is not.
        check_solutions: run the reference solution of each programming problem on its tests.

    Raises:
        ValueError: a file cannot be read, two records have one id, or no problem is left.
    """
    account = Account()
    rows = list(_rows(corpus, read_records(sources), prefix, account))
    rows = _sift(rows, "malformed-gold", _bad_golds(rows), keep, account)
    if too_long is not None:
        rows = _sift(rows, "too-long", {row.problem.id: too_long(row.problem) for _, row in rows}, keep, account)
    if check_solutions:
        rows = _sift(rows, "failing-solution", _failing_solutions(rows), keep, account)
    rows = _sift(rows, "duplicate", _duplicates(rows), keep, account)
    rows = _sift(rows, "overlap", _overlaps(rows, against), keep, account)
    if not rows:
        raise ValueError(f"--source {' '.join(map(str, sources))}: no problem is left: {_counts(account.left_out)}")
    _write(output, (json.dumps(row.as_json(), ensure_ascii=False) for _, row in rows))
    summary = {
        "corpus": name,
        "task": rows[0][1].task,
        "licence": corpus.licence,
        "sources": [{"path": str(path), "sha256": file_sha256(path)} for path in sources],
        "output": {"path": str(output), "sha256": file_sha256(output)},
        "records": account.num_records,
        "problems": len(rows),
        "problems_expected": corpus.size,
        "with_reference_solution": sum(row.problem.reference_solution is not None for _, row in rows),
        "left_out": _counts(account.left_out),
        "kept_anyway": _counts(account.kept_anyway),
        "golds_compared_by_characters_only": _by_characters_only(rows),
        "overlap_rule": f"the same statement, or {MIN_SHARE:.0%} of the shorter one's {NGRAM}-word sequences",
        "against": [{"path": str(path), "sha256": file_sha256(path)} for path in against],
        "findings": account.left_out + account.kept_anyway,
    }
    _write(output.with_name(output.name + ".summary.json"), [json.dumps(summary, indent=1, ensure_ascii=False)])
    return summary


def _rows(corpus: Corpus, records: Iterable[Record], prefix: str, account: Account) -> Iterator[tuple[Record, Row]]:
    seen: dict[str, str] = {}
    with ThreadPoolExecutor() as threads:  # some rows wait for programs in the sandbox
        for record, row in threads.map(lambda record: (record, _row(corpus, record, prefix)), records):
            account.num_records += 1
            if isinstance(row, tuple):
                account.left_out.append({"record": record.where, "finding": row[0], "why": row[1]})
                continue
            if (first := seen.setdefault(row.problem.id, record.where)) != record.where:
                raise ValueError(f"{record.where}: id {row.problem.id} is taken by {first}; give each record its own")
            yield record, row


def _row(corpus: Corpus, record: Record, prefix: str) -> Row | tuple[str, str]:
    """Return the row of a record, or what was found instead, and why."""
    try:
        return corpus.row(record, prefix)
    except SkippedRecord as error:
        return "not-gradable", str(error)
    except ValueError as error:
        return "malformed", str(error)
    except (AttributeError, KeyError, TypeError) as error:  # a field holds something of another kind
        return "malformed", f"{type(error).__name__}: {error}"


def _sift(
    rows: list[tuple[Record, Row]], finding: str, found: dict[str, str], keep: Collection[str], account: Account
) -> list[tuple[Record, Row]]:
    """Leave out the rows for which `found` says why, or only note them."""
    for record, row in rows:
        if why := found.get(row.problem.id):
            notes = account.kept_anyway if finding in keep else account.left_out
            notes.append({"record": record.where, "id": row.problem.id, "finding": finding, "why": why})
    return [(record, row) for record, row in rows if finding in keep or not found.get(row.problem.id)]


def _bad_golds(rows: Sequence[tuple[Record, Row]]) -> dict[str, str]:
    golds = {row.problem.id: row.problem.answer for _, row in rows if row.task == "math"}
    with ThreadPoolExecutor(2) as threads:  # as many as the verifier has processes
        problems = threads.map(gold_problem, golds.values())
        return {name: f"{golds[name]!r}: {why}" for name, why in zip(golds, problems, strict=True) if why}


def _failing_solutions(rows: Sequence[tuple[Record, Row]]) -> dict[str, str]:
    sandbox = shared_sandbox()

    def failure(row: Row) -> str | None:
        if row.tests is None or row.problem.reference_solution is None:
            return None
        tests = CodeTests.from_json(row.tests)
        if tests.special_judge:
            return None
        result = judge_program(row.problem.reference_solution, tests, sandbox=sandbox)
        return None if result.passed else result.describe()

    with ThreadPoolExecutor(sandbox.num_workers) as threads:
        failures = threads.map(failure, (row for _, row in rows))
        return {row.problem.id: why for (_, row), why in zip(rows, failures, strict=True) if why}


def _by_characters_only(rows: Sequence[tuple[Record, Row]]) -> list[str]:
    golds = {row.problem.id: row.problem.answer for _, row in rows if row.task == "math"}
    golds = {name: gold for name, gold in golds.items() if not gold.lstrip("-").isdecimal()}
    with ThreadPoolExecutor(2) as threads:
        read = threads.map(is_read_as_mathematics, golds.values())
        return [f"{name}: {golds[name]}" for name, ok in zip(golds, read, strict=True) if not ok]


def _duplicates(rows: Sequence[tuple[Record, Row]]) -> dict[str, str]:
    seen: dict[str, str] = {}
    firsts = {row.problem.id: seen.setdefault(squeezed(row.problem.prompt), row.problem.id) for _, row in rows}
    return {name: f"the same statement as {first}" for name, first in firsts.items() if first != name}


def _overlaps(rows: Sequence[tuple[Record, Row]], against: Sequence[Path]) -> dict[str, str]:
    index = StatementIndex((row.problem.id, row.problem.prompt) for path in against for _, row in read_rows(path))
    nearest = {row.problem.id: index.nearest(row.problem.prompt) for _, row in rows}
    return {name: f"{near[1]:.0%} of the shorter statement is in {near[0]}" for name, near in nearest.items() if near}


def _counts(findings: Sequence[dict[str, str]]) -> dict[str, int]:
    return dict(Counter(finding["finding"] for finding in findings))


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(partial, path)
