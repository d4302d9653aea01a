"""Samples of code benchmarks in the file formats of their published harnesses."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_trd.benchmarks.benchmark import CONVENTIONS
from megatron_trd.benchmarks.samples_file import Row, read_samples, read_settings
from megatron_trd.log import get_logger
from megatron_trd.tasks.code_problems.evalplus import write_results

logger = get_logger(__name__)


def write_harness_files(directory: str | Path) -> list[Path]:
    """Write what the harnesses of the benchmarks in a directory would have written; return the paths.

    EvalPlus: `<bench>_samples.jsonl`, which its own evaluator reads, and `<bench>_eval_results.json`; failed inputs are
    the first ones, as Python literals. LiveCodeBench: `<bench>_<mode>_eval_all.json`. Ungraded samples are left out.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in read_samples(directory):
        if row.bench in CONVENTIONS and CONVENTIONS[row.bench].harness is not None:
            rows[row.bench].append(row)
    settings, written = read_settings(directory)["benchmarks"], list[Path]()
    for bench, found in rows.items():
        found.sort(key=lambda row: row.key)
        graded = [row for row in found if row.passed is not None]
        if len(graded) < len(found):
            logger.warning("%s: %d ungraded samples are not in its files", bench, len(found) - len(graded))
        if CONVENTIONS[bench].harness == "evalplus":
            written += _write_evalplus(Path(directory), bench, graded, settings[bench]["corpus_sha256"])
        else:
            written.append(_write_livecodebench(Path(directory), bench, graded, settings[bench]["verifier"]["profile"]))
    return written


def _write_evalplus(folder: Path, bench: str, rows: list[Row], corpus_sha256: str) -> list[Path]:
    samples, results = folder / f"{bench}_samples.jsonl", folder / f"{bench}_eval_results.json"
    with samples.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"task_id": _own_id(row), "solution": row.extracted or ""}) + "\n")
    no_program = {"base_status": "fail", "plus_status": "fail", "base_fail_tests": [], "plus_fail_tests": []}
    evaluations = [
        {"task_id": _own_id(row), "solution": row.extracted or "", **(row.evalplus or no_program)} for row in rows
    ]
    write_results(results, evaluations, dataset_hash=corpus_sha256)
    return [samples, results]


def _write_livecodebench(folder: Path, bench: str, rows: list[Row], mode: str) -> Path:
    problems: dict[str, dict[str, Any]] = {}
    for row in rows:
        problem = problems.setdefault(
            row.problem_id,
            {"question_id": _own_id(row), "output_list": [], "code_list": [], "graded_list": [], "metadata": []},
        )
        problem["output_list"].append(row.response)
        problem["code_list"].append(row.extracted or "")
        problem["graded_list"].append(row.passed)
        problem["metadata"].append(json.dumps({"error": row.error} if row.error else {}))
    for problem in problems.values():
        problem["pass@1"] = sum(problem["graded_list"]) / len(problem["graded_list"])
    path = folder / f"{bench}_{mode}_eval_all.json"
    path.write_text(json.dumps([*problems.values()], indent=1), encoding="utf-8")
    return path


def _own_id(row: Row) -> str:
    """Return the benchmark's own id of a problem, without the prefix of our files."""
    return row.problem_id.partition("/")[2]
