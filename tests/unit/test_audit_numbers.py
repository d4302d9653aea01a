"""What an audit measures of a token, its file, and its aggregates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_trd.objectives.token_audit import TokenAudit, largest_outside
from megatron_trd.reporting.audit_file import AuditedResponse, read_audit
from megatron_trd.reporting.audit_numbers import NUM_BINS, audit_numbers


def response(mass: list[float], **fields: Any) -> AuditedResponse:
    num = len(mass)
    tokens = TokenAudit(
        teacher_logprob=(-0.5,) * num,
        epistemic_mass=tuple(mass),
        best_continuation=tuple(0.75 - m / 2 for m in mass),
        kl=tuple(2 * m for m in mass) if fields.pop("with_kl", True) else None,
    )
    defaults: dict[str, Any] = {"problem_id": "p", "along": "y_o", "y_o_verdict": "wrong", "y_r_verdict": "correct"}
    return AuditedResponse(
        **(defaults | fields),
        token_ids=tuple(range(num)),
        token_texts=tuple(f"<{i}>" for i in range(num)),
        tokens=tokens,
        turn=tokens.turn(0.1),
        turn_threshold=0.1,
    )


def written(path: Path, *responses: AuditedResponse) -> Path:
    path.write_text("".join(json.dumps(r.as_json()) + "\n" for r in responses), encoding="utf-8")
    return path


def test_two_modes_and_the_turn() -> None:
    audit = TokenAudit(
        teacher_logprob=(0.0,) * 4, epistemic_mass=(0.0, 0.5, 0.2, 1.0), best_continuation=(1.0, 0.5, 0.6, 0.0)
    )
    assert audit.two_mode == (0.0, 1.0, 0.4, 0.0)  # 1 where both share everything, 0 where one is missing
    assert audit.turn(0.1) == 1 and audit.turn(0.5) == 3 and audit.turn(1.0) is None
    assert largest_outside([7, 3, 9], [-0.1, -0.2, -0.3], frozenset({7, 9})) == -0.2


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    given = [response([0.25, 0.5]), response([0.125], along="y_r", y_r_verdict=None, with_kl=False)]
    path = written(tmp_path / "audit.jsonl", *given)
    assert list(read_audit(path)) == given
    assert json.loads(path.read_text().splitlines()[0])["two_mode"] == [0.5, 1.0]
    assert "kl" not in json.loads(path.read_text().splitlines()[1])  # absent, never zero
    path.write_text(path.read_text() + '{"schema": 1}\n')
    with pytest.raises(ValueError, match=r"audit.jsonl:3: not an audited response"):
        list(read_audit(path))


def test_aggregates_weigh_tokens_and_split_by_the_verdict_on_the_very_response(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    masses = [rng.uniform(0, 0.12, num).tolist() for num in (7, 40, 53)]
    right = response([0.01] * NUM_BINS, along="y_r")
    unknown = response([0.02], y_o_verdict="grader_error")
    path = written(tmp_path / "a.jsonl", *(response(mass) for mass in masses), right, unknown)
    found = audit_numbers([path])
    groups = {(group["along"], group["verdict"]): group for group in found["groups"]}
    assert list(groups) == [("y_o", "not right"), ("y_o", "unknown"), ("y_r", "right")]
    wrong = groups["y_o", "not right"]
    tokens = [token for mass in masses for token in mass]
    assert wrong["tokens"] == 100 and wrong["responses"] == 3
    assert wrong["mean"]["epistemic_mass"] == pytest.approx(np.mean(tokens), rel=1e-6)
    assert wrong["mean"]["kl"] == pytest.approx(2 * np.mean(tokens), rel=1e-6)
    assert "teacher_entropy" not in wrong["mean"]
    turned = [next(i for i, m in enumerate(mass) if m > 0.1) / len(mass) for mass in masses if max(mass) > 0.1]
    assert wrong["turns"]["share"] == len(turned) / 3
    assert wrong["turns"]["median_position"] == pytest.approx(np.median(turned))
    # By hand: the place of token i of n is (i + 1/2) / n.
    cells: list[list[float]] = [[] for _ in range(NUM_BINS)]
    for mass in masses:
        for i, m in enumerate(mass):
            cells[int((i + 0.5) / len(mass) * NUM_BINS)].append(m)
    expected = [pytest.approx(np.mean(cell), rel=1e-6) if cell else None for cell in cells]
    assert wrong["by_position"]["epistemic_mass"] == expected
    assert groups["y_r", "right"]["by_position"]["kl"] == [pytest.approx(0.02)] * NUM_BINS
    assert groups["y_o", "unknown"]["by_position"]["kl"].count(None) == NUM_BINS - 1
    assert "median_position" not in groups["y_r", "right"]["turns"]


def test_a_long_response_is_drawn_with_its_largest_values(tmp_path: Path) -> None:
    mass = [0.0] * 1000
    mass[777] = 0.9
    (strip,) = audit_numbers([written(tmp_path / "a.jsonl", response(mass))])["strips"]
    assert len(strip["texts"]) == len(strip["epistemic_mass"]) == 160 and strip["tokens"] == 1000
    assert strip["epistemic_mass"].count(0.9) == 1 and max(strip["epistemic_mass"]) == 0.9
    assert "<777>" in strip["texts"][strip["epistemic_mass"].index(0.9)]
    assert "".join(strip["texts"]) == "".join(f"<{i}>" for i in range(1000))
    assert audit_numbers([]) == {}
