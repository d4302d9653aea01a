"""Trajectory files: exact round trip, errors that name file and line, repair of a torn last line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.records import Completion, Problem, Trajectory, VersionSpan
from megatron_trd.rollout.trajectory_file import TrajectoryWriter, read_trajectories

FINGERPRINT = {"student": "models/student@default", "seed": "1"}


def trajectory(i: int) -> Trajectory:
    y = Completion(
        token_ids=(i, 5, 1),
        text='two\nlines, "quotes", ünïcode\u2028',
        finish_reason="stop",
        logprobs=(-0.1, -1 / 3, -math.inf),
        weight_spans=(VersionSpan(version="a", start=0, end=2), VersionSpan(version="b", start=2, end=3)),
    )
    return Trajectory(
        problem=Problem(id=f"p{i}", prompt="x", answer="1", reference_solution="y*", metadata={"level": 3}),
        y_o=y,
        y_o_correct=None if i == 0 else i % 2 == 0,
        solve_prompt_ids=(1, 2),
        vanilla_prompt_ids=(1, 2, 3),
        y_r=None if i == 0 else Completion(token_ids=(), text="", finish_reason="abort", error="gave up"),
        y_r_correct=None,
        refine_prompt_ids=() if i == 0 else (9, 9),
        refine_cut_tokens=i,
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
        assert record["schema"] == 1 and record["fingerprint"] == FINGERPRINT


def test_files_that_name_versions_without_their_tokens_still_load(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for record in records:
        for completion in filter(None, (record["y_o"], record["y_r"])):
            completion["weight_versions"] = [span["version"] for span in completion.pop("weight_spans")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for i, loaded in enumerate(read_trajectories(path)):
        everywhere = tuple(VersionSpan(version=version, start=0, end=3) for version in "ab")
        assert loaded.y_o.weight_versions == ("a", "b") and loaded.y_o.weight_spans == everywhere
        assert replace(loaded.y_o, weight_spans=()) == replace(trajectory(i).y_o, weight_spans=())


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
        (lambda _: b"[1, 2]", "not a trajectory of schema 1"),
        (changed("schema", 2), "not a trajectory of schema 1"),
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
