"""Two directories of samples, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_trd.benchmarks.samples_file import differences, read_settings
from megatron_trd.benchmarks.summary import matrices
from megatron_trd.estimators import bootstrap_interval, macro_interval, paired_differences


def compare(before: str | Path, after: str | Path) -> dict[str, Any]:
    """Return the mean of after - before of each problem's avg@k, with 95 % intervals, per benchmark and over all.

    Settings that differ are listed: with another verifier or budget, that is part of what is compared.

    Raises:
        ValueError: the directories share no benchmark, one of them holds other problems, or nothing was graded in both.
    """
    settings = read_settings(before), read_settings(after)
    shared = [name for name in settings[0]["benchmarks"] if name in settings[1]["benchmarks"]]
    if not shared:
        raise ValueError(f"--compare {before} {after}: no benchmark is in both; evaluate the same --benchmarks")
    for name in shared:
        if len({side["benchmarks"][name]["corpus_sha256"] for side in settings}) > 1:
            raise ValueError(f"--compare {before} {after}: {name} was made from different files; use the same one")
    verdicts = matrices(before), matrices(after)
    groups = {}
    for name in shared:
        problems = sorted(verdicts[0][name].keys() & verdicts[1][name].keys())
        rows = ([side[name][problem] for problem in problems] for side in verdicts)
        groups[name] = paired_differences(*rows)
        if not groups[name]:
            raise ValueError(
                f"--compare {before} {after}: no problem of {name} was graded in both; run them to the end"
            )
    found = {
        name: {"mean": float(np.mean(group)), "interval": list(bootstrap_interval(group)), "problems": len(group)}
        for name, group in groups.items()
    }
    if len(groups) > 1:
        means = [np.mean(group) for group in groups.values()]
        found["macro average"] = {
            "mean": float(np.mean(means)),
            "interval": list(macro_interval([*groups.values()])),
            "problems": sum(map(len, groups.values())),
        }
    return {"before": settings[0], "after": settings[1], "settings": differences(*settings), "differences": found}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Render a comparison as Markdown, in percentage points."""
    lines = ["| | after - before | 95 % interval | problems |", "|---|---|---|---|"]
    for name, found in comparison["differences"].items():
        low, high = found["interval"]
        points = f"{100 * found['mean']:+.1f} | [{100 * low:+.1f}, {100 * high:+.1f}]"
        lines.append(f"| {name} | {points} | {found['problems']} |")
    return "\n".join([*lines, "", *comparison["settings"], ""])
