"""One HTML page without a single request: charts are inline SVG, the style is inside, there is no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_trd.reporting.heat_strips import heat_strips
from megatron_trd.reporting.table import columns_and_rows
from megatron_trd.reporting.theme import COLOURS, to_svg

Runs = Sequence[Mapping[str, Any]]
STYLE = Path(__file__).with_name("page.css")


def render(runs: Runs, summaries: Sequence[tuple[str, Mapping[str, Any]]], figures: Mapping[str, Figure]) -> str:
    """Return the page.

    Args:
        runs: `numbers_of` each.
        summaries: name and summary of the training runs that have one.
        figures: `draw_all` of the same runs.
    """
    charts = {name: to_svg(figure, name) for name, figure in figures.items()}

    def chart(name: str, text: str) -> str:
        return f"<figure>{charts[name]}<figcaption>{text}</figcaption></figure>" if name in charts else ""

    sections = {
        "Overview": _overview(summaries),
        "Scores": chart("pass_at_k", _PASS_AT_K) + chart("improvement", _IMPROVEMENT),
        "Responses": _outcomes(runs)
        + chart("pass_by_iteration", _PASS_BY_ITERATION)
        + chart("lengths", _LENGTHS)
        + chart("difficulty", _DIFFICULTY),
        "Diagnostics over training": chart("diagnostics", _DIAGNOSTICS),
        "Time and health": chart("stage_times", "Seconds of wall-clock.") + chart("health", ""),
        "Audit": _audit_table(runs) + chart("audit_positions", _AUDIT) + heat_strips(runs),
    }
    filled = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in filled)
    body = "".join(f'<section id="{_anchor(t)}"><h2>{t}</h2>{content}</section>' for t, content in filled.items())
    names = ", ".join(run["name"] for run in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(names)}</title><style>{_variables()}{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><header><h1>{escape(names)}</h1><nav>{links}</nav></header><main>{body}</main>"
        "<footer>Made by megatron_trd.report. What was not measured is absent. Intervals cover 95 %.</footer>"
        "</body></html>\n"
    )


_PASS_AT_K = (
    "Unbiased estimate of the chance that one of k samples is right, from all samples of a problem. Bands: 95 % "
    "bootstrap over n problems (Wilson where there is one sample of each)."
)
_IMPROVEMENT = (
    "Held-out problems before and after training, by difficulty. The first half of a problem's samples before "
    "training puts it into its bucket, only the second half is its score, so the buckets do not move by chance alone. "
    "Bars: 95 % bootstrap over problems."
)
_PASS_BY_ITERATION = "Of the problems of each iteration whose y_o and y_r are both graded. Bands: Wilson, 95 %."
_LENGTHS = (
    "Median, quartiles (box), 5th to 95th percentile (line). y* and y_o are split by the verdict on y_o, y_r by its "
    "own; responses nobody could grade are left out, truncated ones count with the length they were cut at."
)
_DIFFICULTY = (
    "Mean over problems. Bars: Wilson, or 95 % bootstrap over problems that have several trajectories. Where pass "
    "rates make the buckets, the first half of a problem's trajectories chooses its bucket, the others are its score."
)
_DIAGNOSTICS = (
    "Means over tokens, divided once an iteration. <i>Trained on</i>: the trajectories of the loss; <i>along y_o</i> "
    "and <i>along y_r</i>: audits without training, in the iterations that have one."
)
_AUDIT = (
    "Token-weighted means in twentieths of the response. Epistemic mass: the teacher's probability on words that open "
    "a correction. Two-mode score: twice the smaller of that mass and the likeliest other token's probability."
)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _variables() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "@media print{:root{color-scheme:light}}"
    )


def _overview(summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not summaries:
        return ""
    titles, rows = columns_and_rows([summary for _, summary in summaries])
    names = [name for name, _ in summaries]
    heads = [f"{escape(name)}<small>{escape(title)}</small>" for name, title in zip(names, titles, strict=True)]
    return _table(["", *heads], [[escape(name), *map(escape, values)] for name, values in rows.items()])


def _outcomes(runs: Runs) -> str:
    parts = []
    for run in runs:
        if "outcomes" not in run:
            continue
        found = run["outcomes"]
        counts, num = found["counts"], found["n"]
        shown = {name: f"{count:,} <small>{count / num:.1%}</small>" for name, count in counts.items()}
        cells = [
            ["y_o passes", shown["pass_pass"], shown["pass_fail"]],
            ["y_o fails", shown["fail_pass"], shown["fail_fail"]],
        ]
        stages = "; ".join(f"{which} passes {_rate(found[which])}" for which in ("y_o", "y_r"))
        ratio = f" {_ratio(found['ratio'])}" if "ratio" in found else ""
        title = f"<h3>{escape(run['name'])}</h3>" if len(runs) > 1 else ""
        parts.append(
            f"{title}{_table(['', 'y_r passes', 'y_r fails'], cells)}"
            f"<p>{num:,} trajectories with both responses graded: {stages}.{ratio}</p>"
        )
    return "".join(parts)


def _rate(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['pass']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    ends = f"[{low:.1f}, {'unbounded' if high is None else f'{high:.1f}'}]"
    value = "not once pass → fail" if found["value"] is None else f"{found['value']:.1f}"
    return f"Fail → pass to pass → fail: {value} {ends}."


def _audit_table(runs: Runs) -> str:
    head = ["", "responses", "tokens", "epistemic mass", "two-mode score", "KL", "turns", "median place of turn"]
    rows = []
    for run in runs:
        for group in run.get("audit", {}).get("groups", ()):
            mean, turns = group["mean"], group["turns"]
            low, high = turns["interval"]
            rows.append(
                [
                    escape(f"{run['name']}: " * (len(runs) > 1) + f"{group['along']}, {group['verdict']}"),
                    f"{group['responses']:,}",
                    f"{group['tokens']:,}",
                    f"{1000 * mean['epistemic_mass']:.2f} ‰",
                    f"{1000 * mean['two_mode']:.2f} ‰",
                    f"{mean['kl']:.3f} nats" if "kl" in mean else "-",
                    f"{turns['share']:.1%} <small>[{low:.1%}, {high:.1%}]</small>",
                    f"{turns['median_position']:.0%}" if "median_position" in turns else "-",
                ]
            )
    if not rows:
        return ""
    thresholds = {run["audit"]["turn_threshold"] for run in runs if "audit" in run}
    told = " or ".join(f"{threshold:g}" for threshold in sorted(thresholds))
    return _table(head, rows) + f"<p>The teacher turns at the first token whose epistemic mass exceeds {told}.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render cells that are HTML already."""
    lines = [f"<tr>{''.join(f'<th scope=col>{cell}</th>' for cell in head)}</tr>"]
    for first, *rest in rows:
        lines.append(f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
