"""What the samples of a directory say: scores, rates, lengths, a table like the paper's."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_trd.benchmarks.samples_file import read_samples, read_settings
from megatron_trd.estimators import (
    Matrix,
    averages,
    bootstrap_interval,
    curve_points,
    known_values,
    macro_interval,
    passes,
    scores,
)
from megatron_trd.records import Outcome


def matrices(directory: str | Path) -> dict[str, dict[str, list[bool | None]]]:
    """Return benchmark -> problem -> verdicts of the samples that are there; a `grader_error` is None."""
    found: dict[str, dict[str, list[bool | None]]] = defaultdict(lambda: defaultdict(list))
    for row in read_samples(directory):
        found[row.bench][row.problem_id].append(row.passed)
    return found


def summarize(directory: str | Path) -> dict[str, Any]:
    """Return the summary of a directory, and write it there: summary.json, curves.csv and table.md.

    Samples that are missing, and those that could not be graded, take part in no score and are counted.

    Raises:
        ValueError: the directory holds no sample, or a malformed one.
    """
    settings, verdicts = read_settings(directory), matrices(directory)
    told: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for row in read_samples(directory):
        told[row.bench].append((row.verdict, row.response_tokens, row.prompt_tokens, row.seconds))
    if not told:
        raise ValueError(f"{directory}: holds no sample; look at the servers' logs, and run the same command again")
    benchmarks = {
        name: {
            "samples_per_problem": bench["samples"],
            "missing": bench["problems"] * bench["samples"] - len(told[name]),
            **scores(_padded(verdicts[name].values(), bench["samples"])),
            **_rates(told[name]),
        }
        for name, bench in settings["benchmarks"].items()
        if told[name]
    }
    summary = {"settings": settings, "benchmarks": benchmarks, "macro": _macro(verdicts, settings["benchmarks"])}
    folder = Path(directory)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(summary), encoding="utf-8")
    _write_curves(folder / "curves.csv", verdicts, settings["benchmarks"])
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """Render a summary as Markdown: benchmarks as columns, percentages with 95 % intervals."""
    columns = dict(summary["benchmarks"])
    if summary["macro"]:
        columns["macro average"] = summary["macro"]
    keys = dict.fromkeys(key for bench in columns.values() for key in bench if key.startswith(("avg@", "pass@")))
    rows = [
        [key.capitalize(), *(_with_interval(bench, key) for bench in columns.values())]
        for key in keys
        if not key.endswith("_interval")
    ]
    for key, title in (
        ("within_problem_error", "s.e. on these problems"),
        *((f"{outcome}_rate", outcome.replace("_", " ")) for outcome in get_args(Outcome)[2:]),
    ):
        rows.append([title, *(_percent(bench.get(key)) for bench in columns.values())])
    rows.append(["missing samples", *(str(bench.get("missing", "")) for bench in columns.values())])
    rows.append(["mean tokens", *(_rounded(bench.get("mean_tokens")) for bench in columns.values())])
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    settings = summary["settings"]
    head = f"{settings['model']}, {settings['sampling']}, seed {settings['seed']}"
    return f"{head}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _padded(rows: Iterable[Sequence[bool | None]], num: int) -> Matrix:
    """Fill rows with None up to the number of samples that were asked for."""
    return [[*row, *[None] * (num - len(row))] for row in rows]


def _rates(told: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Return how often each verdict came, and how long responses are, over the samples that are there."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for outcome, tokens, _, _ in told:
        lengths[outcome].append(tokens)
    everything = [tokens for values in lengths.values() for tokens in values]
    return {
        **{f"{outcome}_rate": len(lengths[outcome]) / len(told) for outcome in get_args(Outcome)},
        "mean_tokens": float(np.mean(everything)),
        "max_tokens": max(everything),
        "mean_tokens_by_verdict": {outcome: float(np.mean(values)) for outcome, values in lengths.items() if values},
        "max_prompt_tokens": max(prompt for _, _, prompt, _ in told),
        "mean_seconds": float(np.mean([seconds for _, _, _, seconds in told])),
    }


def _macro(verdicts: Mapping[str, Mapping[str, Sequence[bool | None]]], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain mean over benchmarks; empty unless two or more, of equally many samples, have a score."""
    numbers = {asked[name]["samples"] for name in verdicts}
    if len(verdicts) < 2 or len(numbers) > 1:
        return {}
    k, found = numbers.pop(), dict[str, Any]()
    for key, values in (
        (f"avg@{k}", [averages([*rows.values()]) for rows in verdicts.values()]),
        (f"pass@{k}", [passes([*rows.values()], k) for rows in verdicts.values()]),
    ):
        groups = [known_values(group) for group in values]
        if all(groups):
            found[key] = float(np.mean([np.mean(group) for group in groups]))
            found[f"{key}_interval"] = list(macro_interval(groups))
    return found


def _write_curves(
    path: Path, verdicts: Mapping[str, Mapping[str, Sequence[bool | None]]], asked: Mapping[str, Any]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["benchmark", "k", "pass_at_k", "low", "high", "problems"])
        for name, rows in verdicts.items():
            for k in curve_points(asked[name]["samples"]):
                if values := known_values(passes([*rows.values()], k)):
                    writer.writerow([name, k, float(np.mean(values)), *bootstrap_interval(values), len(values)])


def _with_interval(bench: Mapping[str, Any], key: str) -> str:
    if key not in bench:
        return "-"
    low, high = bench[f"{key}_interval"]
    return f"{100 * bench[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
