"""Trajectory files: exact round trip, errors that name file and line, repair of a torn last line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.records import (
    Candidate,
    Completion,
    KeptPrefix,
    Outcome,
    PrefixProbe,
    Problem,
    Reasoning,
    Selection,
    SelectionReason,
    Trajectory,
    Verdict,
    VersionSpan,
)
from megatron_trd.rollout.trajectory_file import TrajectoryWriter, read_trajectories

OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "truncated", "grader_error")
REASONS: tuple[SelectionReason, ...] = ("first", "first_verified", "none_verified")
FINGERPRINT = {"student": "models/student@default", "seed": "1"}


def trajectory(i: int) -> Trajectory:
    y = Completion(
        token_ids=(i, 5, 1),
        text='two\nlines, "quotes", ünïcode\u2028',
        finish_reason="stop",
        logprobs=(-0.1, -1 / 3, -math.inf),
        weight_spans=(VersionSpan(version="a", start=0, end=2), VersionSpan(version="b", start=2, end=3)),
    )
    failed = Candidate(completion=Completion(token_ids=(), text="", finish_reason="abort"), verdict=None)
    told = Candidate(completion=y, verdict=Verdict(outcome="wrong", extracted="é"))
    probes = (PrefixProbe(num_steps=1, num_tokens=1, verdicts=(None, Verdict(outcome="correct", extracted="1"))),)
    return Trajectory(
        problem=Problem(id=f"p{i}", prompt="x", answer="1", reference_solution="y*", metadata={"level": 3}),
        y_o=y,
        y_o_verdict=None if i == 0 else Verdict(outcome=OUTCOMES[i], extracted="7" if i % 2 else None, error="e"),
        solve_prompt_ids=(1, 2),
        vanilla_prompt_ids=(1, 2, 3),
        y_r=None if i == 0 else Completion(token_ids=(), text="", finish_reason="abort", error="gave up"),
        y_r_verdict=None,
        refine_prompt_ids=() if i == 0 else (9, 9),
        refine_cut_tokens=i,
        vanilla_cut_tokens=2 * i,
        y_r_reasoning=Reasoning(num_tokens=i, student_suffix_ids=(4, 5), teacher_suffix_ids=()) if i == 2 else None,
        kept=None if i < 3 else KeptPrefix(num_tokens=1, num_steps=1, total_steps=4, probes=probes[: i - 3]),
        selection=None if i < 2 else Selection(chosen=i - 2, reason=REASONS[i - 2], rejected=(failed, told)),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sub/t.jsonl"
    with TrajectoryWriter(path, FINGERPRINT) as writer:
        for i in range(5):
            writer.append(trajectory(i))
            assert path.read_bytes().count(b"\n") == i + 1  # nothing is held back
    return path


def test_round_trip_is_exact(path: Path) -> None:
    assert list(read_trajectories(path)) == [trajectory(i) for i in range(5)]
    for line in path.read_text().split("\n")[:-1]:
        record = json.loads(line)
        assert record["schema"] == 2 and record["fingerprint"] == FINGERPRINT


def test_every_cut_is_repaired_to_whole_lines(path: Path) -> None:
    content = path.read_bytes()
    ends = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in (*range(0, len(content), 97), len(content) - 1, len(content), *ends):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends) - 1
        if cut not in ends:
            with pytest.raises(ValueError, match=f"t.jsonl:{whole + 1}: the line is cut off; resume"):
                list(read_trajectories(path))
        with TrajectoryWriter(path, FINGERPRINT) as writer:
            assert writer.done_ids == {f"p{i}" for i in range(whole)}
            for i in range(whole, 5):
                writer.append(trajectory(i))
        assert path.read_bytes() == content


def changed(key: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> bytes:
        target = record
        *parents, last = key.split(".")
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value
        return json.dumps(record).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"{broken", "not valid JSON"),
        (lambda _: b"\xff\xfe", "not valid JSON"),
        (lambda _: b"", "not valid JSON"),
        (lambda _: b"[1, 2]", "not a trajectory of schema 2; make the file anew with python -m megatron_trd.generate"),
        (changed("schema", 1), "not a trajectory of schema 2; make the file anew with python -m megatron_trd.generate"),
        (changed("fingerprint", ...), "no fingerprint"),
        (changed("y_o", ...), "field 'y_o' is missing"),
        (changed("y_o.token_ids", "abc"), "token ids must be a list of non-negative integers"),
        (changed("solve_prompt_ids", [1, 2.5]), "token ids must be a list of non-negative integers"),
        (changed("y_r.token_ids", [-1]), "token ids must be a list of non-negative integers"),
        (changed("y_o.finish_reason", "bored"), "finish_reason 'bored' is unknown"),
        (changed("problem.surprise", 1), "surprise"),
        (changed("y_o.weight_spans", ...), "field 'weight_spans' is missing"),
        (changed("y_o.weight_spans", [{"version": "a"}]), "start"),
        (changed("problem", None), "remove or repair the line"),
        (changed("y_o_verdict", ...), "field 'y_o_verdict' is missing"),
        (changed("y_o_verdict", True), "remove or repair the line"),
        (changed("y_o_verdict.outcome", "right"), "outcome 'right' is unknown"),
        (changed("y_r_reasoning.student_suffix_ids", ["a"]), "token ids must be a list of non-negative integers"),
        (changed("selection.reason", "liked"), "reason 'liked' is unknown"),
        (changed("selection.rejected", [{}]), "field 'completion' is missing"),
    ],
)
def test_a_malformed_line_is_named(path: Path, change: Any, message: str) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[2] = change(json.loads(lines[2]))
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"t\.jsonl:3: ") as error:
        list(read_trajectories(path))
    assert message in str(error.value)
    with pytest.raises(ValueError, match=r"t\.jsonl:3: "):
        TrajectoryWriter(path, FINGERPRINT)


def test_another_fingerprint_is_refused_with_the_difference(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"seed was '1' and is '2'") as error:
        TrajectoryWriter(path, {**FINGERPRINT, "seed": "2"})
    assert "--output" in str(error.value) and "student" not in str(error.value)
    assert path.read_bytes() == before
