"""Single responses as strips of colour: where along its tokens the teacher wants to turn back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import exp, sqrt
from typing import Any

_ROWS = (("epistemic_mass", "epistemic", "mass"), ("kl", "KL", "kl"))
"""Measure, label, class."""


def heat_strips(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the strips of all audits; the text of a token shows where the pointer rests."""
    strips = [_strip(strip) for run in runs for strip in run.get("audit", {}).get("strips", ())]
    if not strips:
        return ""
    return (
        "<h3>Token by token</h3><p>The first responses of the file, not selected. Epistemic mass m: colour grows with "
        "√m up to 1. KL in nats: with 1 - exp(-KL). An edge marks where the teacher turns. In a long response a cell "
        "holds several tokens and the largest of their values.</p>" + "".join(strips)
    )


def _strip(strip: Mapping[str, Any]) -> str:
    turn = "" if strip["turn"] is None else f", the teacher turns at token {strip['turn'] + 1:,}"
    name = f"<b>{escape(strip['problem_id'])}</b>"
    head = f"{name} {strip['along']}, {strip['verdict']}, {strip['tokens']:,} tokens{turn}"
    rows = "".join(
        f'<div><span>{label}</span><div class="cells {css}">{_cells(strip, measure)}</div></div>'
        for measure, label, css in _ROWS
        if measure in strip
    )
    return f'<div class="strip"><p>{head}</p>{rows}</div>'


def _cells(strip: Mapping[str, Any], measure: str) -> str:
    first, turn = strip["first"], strip["turn"]
    turned = None if turn is None else max(place for place, start in enumerate(first) if start <= turn)
    cells = []
    for place, (start, text, value) in enumerate(zip(first, strip["texts"], strip[measure], strict=True)):
        depth = sqrt(value) if measure == "epistemic_mass" else 1 - exp(-value)
        shown = f"m = {value:.4f}" if measure == "epistemic_mass" else f"KL = {value:.3f} nats"
        mark = " class=turn" if place == turned else ""
        cells.append(f'<i{mark} style="--v:{depth:.3f}" title="{escape(f"{start + 1:,}: {text!r}  {shown}")}"></i>')
    return "".join(cells)
