"""A run in one table, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trd.config.schema import Config
from megatron_trd.metrics import read_metrics
from megatron_trd.rollout.evaluation import paired_difference

OUTCOMES = ("pass_pass", "pass_fail", "fail_pass", "fail_fail")


def summarize_run(
    config: Config, progress: Any, seconds: Mapping[str, float], after: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Collect what a run measured; what was not measured is absent, never zero.

    Args:
        progress: the trainer's `Progress` at the end.
        seconds: wall-clock of each stage since the run began.
        after: final evaluation; `progress.before` is the first one.
    """
    first = progress.first
    summary: dict[str, Any] = {
        "method": f"{config.method.mode} {config.method.trajectory} {config.objective.divergence}",
        "iterations": progress.iteration,
        "steps": progress.step,
        "consumed_samples": progress.consumed_samples,
        "before": progress.before,
        "after": after,
        "difference": paired_difference(progress.before, after) if progress.before and after else None,
        "y_o_pass": first.get("rollout/y_o_pass"),
        "y_r_pass": first.get("rollout/y_r_pass"),
        "outcomes": {name: int(first[f"rollout/{name}"]) for name in OUTCOMES if f"rollout/{name}" in first},
        "epistemic_mass": {
            which: first[tag] for which in ("y_o", "y_r") if (tag := f"audit/{which}/epistemic_mass") in first
        },
        "staleness": _staleness(config) if config.rollout.rollout_staleness else None,
        "logprob_gap": max(read_metrics(config.checkpoint.run_dir, "weights/logprob_gap_max"), default=None),
        "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
        "tensorboard": str(Path(config.checkpoint.run_dir) / "tensorboard"),
    }
    return {key: value for key, value in summary.items() if value not in (None, {})}


def _staleness(config: Config) -> dict[str, float]:
    """Return how far the sampling weights were behind the trained ones, in iterations, over the whole run."""
    mean, largest, redone = (
        read_metrics(config.checkpoint.run_dir, f"rollout/{tag}")
        for tag in ("staleness_mean", "staleness_max", "redone_stale")
    )
    return {"mean": sum(mean) / len(mean), "max": max(largest), "redone": sum(redone)} if mean else {}


def closing_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Render one or more summaries as columns of a table."""
    return _grid(*columns_and_rows(summaries))


def columns_and_rows(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """Return a title for each summary, and what each row says of them; "-" where one does not have it."""
    rows: dict[str, list[str]] = {}

    def row(name: str, values: Sequence[str | None]) -> None:
        if any(value is not None for value in values):
            rows[name] = [value if value is not None else "-" for value in values]

    for moment in ("before", "after"):
        keys = {key for s in summaries for key in s.get(moment, {}) if key.startswith(("avg@", "pass@"))}
        for key in sorted(key for key in keys if "interval" not in key):
            row(f"{moment} {key}", [_score(s.get(moment), key) for s in summaries])
    row("gain, paired", [_gain(s.get("difference")) for s in summaries])
    row("y_o passes (first iteration)", [_percent(s.get("y_o_pass")) for s in summaries])
    row("y_r passes (first iteration)", [_percent(s.get("y_r_pass")) for s in summaries])
    for name in OUTCOMES:
        was, becomes = name.split("_")
        row(f"y_o {was} -> y_r {becomes}", [_text(s.get("outcomes", {}).get(name)) for s in summaries])
    for which in ("y_o", "y_r"):
        masses = [s.get("epistemic_mass", {}).get(which) for s in summaries]
        row(f"epistemic mass on {which}", [None if m is None else f"{1000 * m:.2f} per mille" for m in masses])
    ages = [s.get("staleness", {}) for s in summaries]
    row("staleness in iterations", [f"{age['mean']:.2f}, at most {age['max']:.0f}" if age else None for age in ages])
    row("completions redone, too stale", [f"{age['redone']:.0f}" if age else None for age in ages])
    gaps = [s.get("logprob_gap") for s in summaries]
    row("largest log-prob gap, trainer to servers", [None if gap is None else f"{gap:.1E} nats" for gap in gaps])
    for stage in dict.fromkeys(stage for s in summaries for stage in s.get("seconds", {})):
        row(f"seconds: {stage}", [_text(s.get("seconds", {}).get(stage)) for s in summaries])
    row("TensorBoard", [s.get("tensorboard") for s in summaries])
    titles = [f"{s['method']}, after {s['iterations']} iterations" for s in summaries]
    return titles, rows


def _grid(titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    first = max(map(len, rows)) if rows else 0
    widths = [max(len(title), *(len(r[i]) for r in rows.values())) for i, title in enumerate(titles)]
    lines = ["  ".join([" " * first, *(t.rjust(w) for t, w in zip(titles, widths, strict=True))])]
    lines.append("-" * len(lines[0]))
    for name, values in rows.items():
        lines.append("  ".join([name.ljust(first), *(v.rjust(w) for v, w in zip(values, widths, strict=True))]))
    return "\n".join(lines)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _score(result: Mapping[str, Any] | None, key: str) -> str | None:
    if not result or key not in result:
        return None
    low, high = result.get(f"{key}_interval", (None, None))
    interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * result[key]:.1f} %{interval}"


def _gain(difference: Mapping[str, Any] | None) -> str | None:
    if not difference:
        return None
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
