"""Charts of plain numbers. Each draws what the runs have; without anything to draw there is no chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_trd.reporting.theme import LIGHT, RIGHT, SERIES, WRONG, panels, style

Runs = Sequence[Mapping[str, Any]]
DASHES = ("-", "--", ":", "-.")
WIDE, NARROW = 10.4, 6.8
"""Widths of several charts beside each other, and of one alone, in inches."""

# Title, unit, factor, logarithmic, and (tag, label) of each line.
_Panel = tuple[str, str, float, bool, tuple[tuple[str, str], ...]]
DIAGNOSTICS: tuple[_Panel, ...] = (
    ("Training loss", "loss", 1, False, (("train/loss", ""),)),
    (
        "Divergence by the verdict on y_o",
        "nats per token",
        1,
        False,
        (("distill/divergence_correct", "D_correct"), ("distill/divergence_incorrect", "D_incorrect")),
    ),
    (
        "Audited divergence",
        "nats per token",
        1,
        False,
        (("audit/y_o/divergence", "along y_o"), ("audit/y_r/divergence", "along y_r")),
    ),
    ("Perplexity gap, student - teacher", "perplexity", 1, False, (("distill/perplexity_gap", ""),)),
    (
        "Epistemic mass of the teacher",
        "per mille",
        1000,
        False,
        (
            ("distill/epistemic_mass", "trained on"),
            ("audit/y_o/epistemic_mass", "along y_o"),
            ("audit/y_r/epistemic_mass", "along y_r"),
        ),
    ),
    ("Top-1 agreement", "% of tokens", 100, False, (("distill/top1_agreement", ""),)),
    (
        "Entropy",
        "nats per token",
        1,
        False,
        (("distill/student_entropy", "student"), ("distill/teacher_entropy", "teacher")),
    ),
    ("Clipped tokens", "% of tokens", 100, False, (("distill/clip_fraction", ""),)),
    ("Gradient norm before clipping", "norm", 1, True, (("train/grad_norm", ""),)),
    ("Learning rate", "", 1, False, (("train/lr", ""),)),
)
HEALTH: tuple[_Panel, ...] = (
    ("Throughput of training", "tokens / s / GPU", 1, False, (("perf/tokens_per_s_per_gpu", ""),)),
    (
        "Log-prob gap, trainer to servers",
        "nats",
        1,
        True,
        (("weights/logprob_gap_mean", "mean"), ("weights/logprob_gap_max", "largest")),
    ),
    (
        "Staleness of sampled tokens",
        "iterations",
        1,
        False,
        (("rollout/staleness_mean", "mean"), ("rollout/staleness_max", "largest")),
    ),
    (
        "Mean length of responses",
        "tokens",
        1,
        False,
        (("rollout/y_o_tokens", "y_o"), ("rollout/y_r_tokens", "y_r")),
    ),
    (
        "Truncated responses",
        "% of responses",
        100,
        False,
        (("rollout/y_o_truncated", "y_o"), ("rollout/y_r_truncated", "y_r")),
    ),
)


def draw_all(runs: Runs) -> dict[str, Figure]:
    """Return name -> chart."""
    charts: Mapping[str, Callable[[], Figure | None]] = {
        "pass_at_k": lambda: pass_curves(runs),
        "improvement": lambda: buckets(runs, "improvement", ("before", "after")),
        "pass_by_iteration": lambda: pass_by_iteration(runs),
        "lengths": lambda: length_boxes(runs),
        "difficulty": lambda: buckets(runs, "difficulty", ("y_o", "y_r")),
        "diagnostics": lambda: series_panels(runs, DIAGNOSTICS),
        "stage_times": lambda: stage_times(runs),
        "health": lambda: series_panels(runs, HEALTH),
        "audit_positions": lambda: audit_positions(runs),
    }
    with style():
        drawn = {name: draw() for name, draw in charts.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def pass_curves(runs: Runs) -> Figure | None:
    """Draw pass@k of every evaluation, a chart for each set of problems."""
    curves = [(run["name"], entry) for run in runs for entry in run.get("scores", ())]
    sets = list(dict.fromkeys(entry["set"] for _, entry in curves))
    if not sets:
        return None
    figure, axes = panels(len(sets), min(2, len(sets)), height=3.4, width=WIDE if len(sets) > 1 else NARROW)
    for ax, name in zip(axes, sets, strict=True):
        ticks: set[int] = set()
        for place, (run, entry) in enumerate((run, entry) for run, entry in curves if entry["set"] == name):
            label = f"{_label(runs, run, entry['moment']) or run} (n = {entry['problems']})"
            ks = [point["k"] for point in entry["curve"]]
            ticks.update(ks)
            _line(ax, ks, entry["curve"], SERIES[place % len(SERIES)], label)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        ax.minorticks_off()
        ax.set(xlabel="k, samples that may be tried", ylabel="pass@k", title=f"Pass@k: {name}", ylim=(-0.02, 1.02))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.legend(loc="lower right")
    return figure


def pass_by_iteration(runs: Runs) -> Figure | None:
    """Draw how often both stages pass, with Wilson's band."""
    drawn = [run for run in runs if "pass_by_iteration" in run]
    if not drawn:
        return None
    figure, (ax,) = panels(1, 1, height=3.2)
    for place, run in enumerate(drawn):
        for stage, (which, points) in enumerate(run["pass_by_iteration"].items()):
            colour = SERIES[(2 * place + stage) % len(SERIES)]
            label = _label(runs, run["name"], which)
            _line(ax, [point["iteration"] for point in points], points, colour, label)
    ax.set(xlabel="iteration", ylabel="verifier pass", ylim=(-0.02, 1.02), title="Responses that pass the verifier")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower right")
    return figure


def _line(ax: Axes, x: Sequence[float], points: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    ax.plot(x, [point["pass"] for point in points], color=colour, marker="o", markersize=3.5, label=label)
    low, high = zip(*(point["interval"] for point in points), strict=True)
    ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def length_boxes(runs: Runs) -> Figure | None:
    """Draw the quartiles of all lengths, whiskers from the 5th to the 95th percentile, and the median's value."""
    drawn = [run for run in runs if run.get("lengths")]
    if not drawn:
        return None
    num_rows = max(len(run["lengths"]) for run in drawn)
    figure, axes = panels(len(drawn), min(2, len(drawn)), height=0.9 + 0.36 * num_rows)
    for ax, run in zip(axes, drawn, strict=True):
        rows = list(reversed(run["lengths"]))
        for place, row in enumerate(rows):
            low, first, median, third, high = row["quantiles"]
            colour = RIGHT if row["verdict"] == "right" else WRONG
            ax.plot([low, high], [place, place], color=colour, linewidth=1.2)
            ax.barh(place, third - first, left=first, height=0.5, color=colour, alpha=0.35, linewidth=0)
            ax.plot([median, median], [place - 0.25, place + 0.25], color=colour, linewidth=2.4)
            ax.annotate(f"{median:,.0f}", (median, place + 0.27), ha="center", va="bottom", fontsize=8)
        ax.set_yticks(range(len(rows)), [f"{row['response']}, {row['verdict']} (n = {row['n']:,})" for row in rows])
        ends = [quantile for row in rows for quantile in row["quantiles"]]
        if min(ends) > 0 and max(ends) > 20 * min(ends):
            ax.set_xscale("log")
        else:
            ax.set_xlim(0, 1.06 * max(ends))
        ax.set(xlabel="tokens", title=_label(runs, run["name"], "") or "Length of responses", ylim=(-0.6, len(rows)))
        ax.grid(False, axis="y")
    return figure


def buckets(runs: Runs, key: str, pair: tuple[str, str]) -> Figure | None:
    """Draw two pass rates in buckets of difficulty."""
    found = [(run["name"], run[key]) for run in runs if run.get(key)]
    if not found:
        return None
    figure, axes = panels(len(found), min(2, len(found)), height=3.0, width=WIDE if len(found) > 1 else NARROW)
    for ax, (name, content) in zip(axes, found, strict=True):
        rows = content["buckets"] if isinstance(content, Mapping) else content
        by = content["by"] if isinstance(content, Mapping) else "pass rate in the first half of the samples before"
        for side, which in enumerate(pair):
            places = [place + 0.38 * side for place, row in enumerate(rows) if which in row]
            rates = [row[which] for row in rows if which in row]
            heights = [rate["pass"] for rate in rates]
            # A mean over problems can leave its bootstrap interval by rounding alone.
            errors = [[max(0.0, rate["pass"] - rate["interval"][0]) for rate in rates]]
            errors.append([max(0.0, rate["interval"][1] - rate["pass"]) for rate in rates])
            ax.bar(places, heights, 0.34, color=SERIES[side], alpha=0.75, label=which)
            ax.errorbar(places, heights, errors, fmt="none", ecolor=LIGHT["ink"], elinewidth=1, capsize=2.5)
        counts = [row.get("problems") or row[pair[0] if pair[0] in row else pair[1]]["problems"] for row in rows]
        labels = [f"{row['bucket']}\nn = {count}" for row, count in zip(rows, counts, strict=True)]
        ax.set_xticks([place + 0.19 for place in range(len(rows))], labels)
        ax.set(xlabel=by, ylabel="pass", ylim=(0, 1.02), title=_label(runs, name, ""))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.grid(False, axis="x")
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2)
    return figure


def series_panels(runs: Runs, wanted: Sequence[_Panel]) -> Figure | None:
    """Draw small charts over the iterations: a colour for each run, a dash for each line."""
    lines = [
        (panel, [(run, tag, label) for run in runs for tag, label in panel[4] if tag in run.get("series", {})])
        for panel in wanted
    ]
    lines = [(panel, found) for panel, found in lines if found]
    if not lines:
        return None
    last = max(run["series"][tag][-1][0] for _, found in lines for run, tag, _ in found)
    figure, axes = panels(len(lines), min(3, len(lines)))
    for ax, ((title, unit, factor, logarithmic, tags), found) in zip(axes, lines, strict=True):
        for run, tag, label in found:
            iterations, values = zip(*run["series"][tag], strict=True)
            place, dash = list(runs).index(run), [t for t, _ in tags].index(tag)
            colour = SERIES[(dash if len(runs) == 1 else place) % len(SERIES)]
            few = len(iterations) < 4
            ax.plot(
                iterations,
                [factor * value for value in values],
                DASHES[0 if len(runs) == 1 else dash % len(DASHES)],
                color=colour,
                marker="o" if few else None,
                markersize=4,
                label=_label(runs, run["name"], label),
            )
        if logarithmic and min(value for run, tag, _ in found for _, value in run["series"][tag]) > 0:
            ax.set_yscale("log")
        ax.set(title=title, ylabel=unit, xlabel="iteration", xlim=(0.5, last + 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(runs) > 1 or len(tags) > 1:
            ax.legend(fontsize=7)
    return figure


def stage_times(runs: Runs) -> Figure | None:
    """Draw the seconds of each stage, stacked, iteration by iteration."""
    drawn = [run for run in runs if any(tag.startswith("time/") for tag in run.get("series", ()))]
    if not drawn:
        return None
    stages = list(dict.fromkeys(tag for run in drawn for tag in run["series"] if tag.startswith("time/")))
    figure, axes = panels(len(drawn), min(2, len(drawn)), height=2.9)
    for ax, run in zip(axes, drawn, strict=True):
        base: dict[float, float] = {}
        for place, tag in enumerate(stages):
            points = run["series"].get(tag, ())
            bottoms = [base.get(iteration, 0.0) for iteration, _ in points]
            iterations, seconds = [i for i, _ in points], [s for _, s in points]
            label = tag.removeprefix("time/").removesuffix("_s")
            ax.bar(iterations, seconds, 0.8, bottoms, color=SERIES[place % len(SERIES)], alpha=0.85, label=label)
            base |= {i: b + s for i, b, s in zip(iterations, bottoms, seconds, strict=True)}
        title = _label(runs, run["name"], "") or "Wall-clock of each stage"
        ax.set(xlabel="iteration", ylabel="seconds", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(False, axis="x")
        ax.legend(loc="upper center", ncols=5, fontsize=7.5)
        ax.margins(y=0.25)
    return figure


def audit_positions(runs: Runs) -> Figure | None:
    """Draw what the teacher says over the relative position, by response and verdict."""
    groups = [(run["name"], group) for run in runs for group in run.get("audit", {}).get("groups", ())]
    titles = {
        "epistemic_mass": ("Epistemic mass", "per mille", 1000),
        "two_mode": ("Two-mode score", "per mille", 1000),
        "kl": ("KL(teacher || student)", "nats per token", 1),
        "teacher_entropy": ("Entropy of the teacher", "nats per token", 1),
    }
    shown = [measure for measure in titles if any(measure in group["by_position"] for _, group in groups)]
    if not shown:
        return None
    figure, axes = panels(len(shown), 2, height=2.9)
    for ax, measure in zip(axes, shown, strict=True):
        title, unit, factor = titles[measure]
        for place, (name, group) in enumerate(groups):
            values = group["by_position"].get(measure, ())
            points = [((i + 0.5) / len(values), factor * v) for i, v in enumerate(values) if v is not None]
            if points:
                label = _label(runs, name, f"{group['along']} {group['verdict']} (n = {group['responses']})")
                ax.plot(*zip(*points, strict=True), color=SERIES[place % len(SERIES)], label=label)
        ax.set(title=title, ylabel=unit, xlabel="place in the response", xlim=(0, 1))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(fontsize=7.5)
    return figure


def _label(runs: Runs, name: str, what: str) -> str:
    """Name a line: by its run only where there are several."""
    return what if len(runs) == 1 else f"{name}, {what}" if what else name
