"""Audited responses in numbers: by the verdict on them, and by the place in the response."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_trd.estimators import wilson_interval
from megatron_trd.reporting.audit_file import AuditedResponse, read_audit

NUM_BINS = 20
STRIPS, CELLS = 12, 160
"""Responses drawn token by token, and cells of each: a longer response puts several tokens into one."""
MEASURES = ("epistemic_mass", "two_mode", "kl", "teacher_entropy")


def audit_numbers(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Return the aggregates of all files, and the first responses for drawing. Empty without a file."""
    groups: dict[tuple[str, str], _Group] = {}
    strips: list[dict[str, Any]] = []
    threshold: float | None = None
    for response in (response for path in paths for response in read_audit(path)):
        key = (response.along, verdict_on(response))
        groups.setdefault(key, _Group()).add(response)
        threshold = response.turn_threshold
        if len(strips) < STRIPS:
            strips.append(_strip(response))
    if not groups:
        return {}
    found = [{"along": a, "verdict": v, **groups[a, v].numbers()} for a, v in sorted(groups, key=_order)]
    return {"turn_threshold": threshold, "groups": found, "strips": strips}


def verdict_on(response: AuditedResponse) -> str:
    """Return `right`, `not right` or `unknown`: the verdict on the very response."""
    outcome = response.y_o_verdict if response.along == "y_o" else response.y_r_verdict
    return "unknown" if outcome in (None, "grader_error") else "right" if outcome == "correct" else "not right"


def _order(key: tuple[str, str]) -> tuple[str, int]:
    return key[0], ("right", "not right", "unknown").index(key[1])


class _Group:
    """Sums over the tokens of responses of one kind: in all, and by the place in the response."""

    def __init__(self) -> None:
        self.num_responses = self.num_tokens = 0
        self.turns: list[float] = []
        self.sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(NUM_BINS))
        self.counts = np.zeros(NUM_BINS)

    def add(self, response: AuditedResponse) -> None:
        num = len(response.token_ids)
        bins = ((np.arange(num) + 0.5) * NUM_BINS / num).astype(np.int64)
        self.num_responses += 1
        self.num_tokens += num
        self.counts += np.bincount(bins, minlength=NUM_BINS)
        for measure in MEASURES:
            if (values := getattr(response.tokens, measure)) is not None:
                self.sums[measure] += np.bincount(bins, weights=values, minlength=NUM_BINS)
        if response.turn is not None:
            self.turns.append(response.turn / num)

    def numbers(self) -> dict[str, Any]:
        """Return token-weighted means; a place without tokens has None."""
        share = len(self.turns) / self.num_responses
        return {
            "responses": self.num_responses,
            "tokens": self.num_tokens,
            "mean": {measure: float(sums.sum() / self.num_tokens) for measure, sums in self.sums.items()},
            "by_position": {
                measure: [float(s / n) if n else None for s, n in zip(sums, self.counts, strict=True)]
                for measure, sums in self.sums.items()
            },
            "turns": {
                "share": share,
                "interval": list(wilson_interval(len(self.turns), self.num_responses)),
                **({"median_position": float(np.median(self.turns))} if self.turns else {}),
            },
        }


def _strip(response: AuditedResponse) -> dict[str, Any]:
    """Return a response as cells, each with its largest values and its text."""
    num = len(response.token_ids)
    edges = [num * i // min(num, CELLS) for i in range(min(num, CELLS) + 1)]
    spans = list(itertools.pairwise(edges))

    def largest(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [max(values[a:b]) for a, b in spans]

    measured = {measure: largest(getattr(response.tokens, measure)) for measure in MEASURES[:3]}
    return {
        "problem_id": response.problem_id,
        "along": response.along,
        "verdict": verdict_on(response),
        "tokens": num,
        "turn": response.turn,
        "first": [a for a, _ in spans],
        "texts": ["".join(response.token_texts[a:b]) for a, b in spans],
        **{measure: values for measure, values in measured.items() if values is not None},
    }
