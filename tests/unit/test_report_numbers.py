"""What a report says of a run's files, against counts by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_trd.benchmarks.samples_file import Row
from megatron_trd.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, RolloutConfig
from megatron_trd.estimators import wilson_interval
from megatron_trd.records import Completion, Outcome, Problem, Trajectory, Verdict
from megatron_trd.reporting.numbers import numbers_of, score
from megatron_trd.reporting.responses import Outline, by_difficulty, describe_outcomes, lengths
from megatron_trd.reporting.run_files import find_runs
from megatron_trd.rollout.saved_trajectories import save_trajectories
from megatron_trd.rollout.trajectory_file import TrajectoryWriter, read_fingerprint


def trajectory(problem: str, y_o: Outcome | None, y_r: Outcome | None, *, tokens: int = 3) -> Trajectory:
    def completion(num: int, outcome: Outcome | None) -> Completion:
        return Completion(token_ids=(1,) * num, text="", finish_reason="stop" if outcome else "abort")

    return Trajectory(
        problem=Problem(id=problem, prompt="x", answer="1", reference_solution="a b c d"),
        y_o=completion(tokens, y_o),
        y_o_verdict=None if y_o is None else Verdict(outcome=y_o),
        solve_prompt_ids=(1,),
        vanilla_prompt_ids=(1,),
        y_r=completion(2 * tokens, y_r),
        y_r_verdict=None if y_r is None else Verdict(outcome=y_r),
        refine_prompt_ids=(1, 2),
    )


def test_a_file_of_trajectories(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TrajectoryWriter(path, {"mode": "opsd"}) as writer:
        writer.append(trajectory("a", "correct", "correct", tokens=10))
        writer.append(trajectory("b", "truncated", "correct", tokens=20))
        writer.append(trajectory("c", "wrong", None, tokens=30))  # its refinement failed
        writer.append(trajectory("d", "grader_error", "wrong", tokens=40))
    (run,) = find_runs([path])
    found = numbers_of(run, count_tokens=lambda text: len(text.split()))
    assert found["name"] == "t.jsonl"
    assert found["outcomes"]["counts"] == {"pass_pass": 1, "pass_fail": 0, "fail_pass": 1, "fail_fail": 0}
    medians = {(row["response"], row["verdict"]): (row["n"], row["quantiles"][2]) for row in found["lengths"]}
    assert medians == {
        ("y*", "right"): (1, 4),
        ("y*", "not right"): (2, 4),
        ("y_o", "right"): (1, 10),
        ("y_o", "not right"): (2, 25),
        ("y_r", "right"): (2, 30),
        ("y_r", "not right"): (1, 80),
    }
    # One trajectory of each problem tells nothing of difficulty, and nothing was trained, evaluated or audited.
    assert found.keys() == {"name", "outcomes", "lengths"}
    assert {row["response"] for row in numbers_of(run)["lengths"]} == {"y_o", "y_r"}  # y* cannot be measured


def test_the_ratio_of_repairs_to_damage() -> None:
    found = describe_outcomes({"pass_pass": 60, "pass_fail": 2, "fail_pass": 30, "fail_fail": 8})
    assert found["n"] == 100 and found["y_o"]["pass"] == 0.62 and found["y_r"]["pass"] == 0.90
    assert found["y_r"]["interval"] == list(wilson_interval(90, 100))
    low, high = wilson_interval(30, 32)
    assert found["ratio"]["value"] == 15
    assert found["ratio"]["interval"] == pytest.approx([low / (1 - low), high / (1 - high)])
    never = describe_outcomes({"pass_pass": 1, "pass_fail": 0, "fail_pass": 9, "fail_fail": 0})["ratio"]
    assert never["value"] is None and never["interval"][0] > 1 and never["interval"][1] is None
    assert "ratio" not in describe_outcomes({"pass_pass": 1, "pass_fail": 0, "fail_pass": 0, "fail_fail": 4})


def outlines(verdicts: dict[str, list[bool]]) -> list[Outline]:
    return [
        Outline(problem_id=name, difficulty=None, tokens={}, y_o=passed, y_r=True)
        for name, row in verdicts.items()
        for passed in row
    ]


def test_no_verdict_decides_about_its_own_bucket() -> None:
    """Fair coins: buckets of the rate itself would run from 0 to 1, but every one of these holds one half."""
    draws = np.random.default_rng(0).random((400, 6)) < 0.5
    found = by_difficulty(outlines({str(i): row.tolist() for i, row in enumerate(draws)}))
    assert [row["bucket"] for row in found["buckets"]] == ["0 %", "up to 50 %", "above 50 %", "100 %"]
    for row in found["buckets"]:
        low, high = row["y_o"]["interval"]
        assert low - 0.02 < 0.5 < high + 0.02 and high - low < 0.2, row
        assert row["y_r"]["pass"] == 1.0
    assert by_difficulty(outlines({"a": [True], "b": [False]})) == {}


def test_difficulty_of_the_corpus_comes_first() -> None:
    rows = [
        Outline(problem_id=str(i), difficulty=level, tokens={}, y_o=i % 4 < level, y_r=None)
        for level in (1, 3)
        for i in range(4)
    ]
    found = by_difficulty(rows)
    assert [(row["bucket"], row["y_o"]["pass"], row["y_o"]["n"]) for row in found["buckets"]] == [
        ("1", 0.25, 4),
        ("3", 0.75, 4),
    ]
    assert found["buckets"][0]["y_o"]["interval"] == list(wilson_interval(1, 4))
    assert "y_r" not in found["buckets"][0]


def test_a_training_run(tmp_path: Path) -> None:
    before = {"problem_ids": ["a", "b"], "correct": [[False, False, True, False], [True, True, False, True]]}
    after = {"problem_ids": ["a", "b"], "correct": [[True, True, True, False], [True, True, None, True]]}
    summary = {"method": "m", "before": before, "after": after, "iterations": 2}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    table = {"rollout/pass_pass": 3.0, "rollout/pass_fail": 0.0, "rollout/fail_pass": 1.0, "rollout/fail_fail": 0.0}
    lines = [{"iteration": 1, "step": 1, "train/loss": 2.0, **table}, {"iteration": 2, "step": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = find_runs([tmp_path])
    found = numbers_of(run)
    assert found["series"]["train/loss"] == [(1, 2.0)]  # the second iteration has none, and gets none
    assert found["pass_by_iteration"]["y_r"] == [
        {"iteration": 1, "n": 4, "pass": 1.0, "interval": list(wilson_interval(4, 4))}
    ]
    assert [(row["bucket"], row["before"]["pass"], row["after"]["pass"]) for row in found["improvement"]] == [
        ("0 %", 0.5, 0.75),  # chosen by its first two samples, scored by the last two
        ("100 %", 0.5, 1.0),
    ]
    curves = {entry["moment"]: {p["k"]: p["pass"] for p in entry["curve"]} for entry in found["scores"]}
    assert curves["before"] == {1: 0.5, 2: pytest.approx((1 / 2 + 1) / 2), 4: 1.0}
    assert curves["after"][4] == 1.0 and curves["after"][1] == (0.75 + 1) / 2


def test_an_evaluation(tmp_path: Path) -> None:
    row = Row(
        bench="aime",
        problem_id="a",
        sample_id=0,
        seed=1,
        prompt_sha256="",
        prompt_tokens=1,
        response="",
        finish_reason="stop",
        response_tokens=1,
        extracted=None,
        verdict="correct",
        error=None,
        verifier={},
        seconds=0.1,
        weight_version="v",
    )
    rows = [row, replace(row, sample_id=1, verdict="wrong"), replace(row, problem_id="b", verdict="grader_error")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    (run,) = find_runs([tmp_path])
    (found,) = numbers_of(run)["scores"]
    assert (found["set"], found["moment"], found["problems"], found["samples"]) == ("aime", "", 2, 2)
    assert [(point["k"], point["pass"]) for point in found["curve"]] == [(1, 0.5), (2, 1.0)]


def test_one_sample_of_each_problem_has_wilsons_interval() -> None:
    found = score([[True], [False], [None], [True]])
    assert found["curve"] == [{"k": 1, "pass": pytest.approx(2 / 3), "interval": list(wilson_interval(2, 3))}]


def test_what_a_run_saves_is_found(tmp_path: Path) -> None:
    model, url = ModelConfig(hf_checkpoint="student"), ("http://127.0.0.1:1",)
    rollout = RolloutConfig(student_urls=url, teacher_urls=url)
    checkpoint = CheckpointConfig(run_dir=str(tmp_path), save_trajectories=True)
    config = Config(model=model, rollout=rollout, checkpoint=checkpoint)
    save_trajectories(config, 1, [trajectory("a", "wrong", "wrong"), trajectory("b", "wrong", "correct")])
    save_trajectories(config, 2, [trajectory("c", "correct", "wrong")] * 2)
    path = save_trajectories(config, 2, [trajectory("c", "correct", "correct")])  # it ran again, after a resume
    assert path.name == "iter_0000002.jsonl" and read_fingerprint(path)["mode"] == "opsd"
    (run,) = find_runs([tmp_path])
    assert numbers_of(run)["outcomes"]["counts"] == {"pass_pass": 1, "pass_fail": 0, "fail_pass": 1, "fail_fail": 1}
    with pytest.raises(ValueError, match="--save-trajectories True: they are in the file of --trajectories already"):
        replace(config, data=DataConfig(trajectories="t.jsonl"))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("x/run", "y/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text('{"iteration": 1, "step": 1, "train/loss": 1.0}\n')
    assert [run.name for run in find_runs([tmp_path / "x/run", tmp_path / "y/run"])] == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="given twice"):
        find_runs([tmp_path / "x/run"] * 2)
    with pytest.raises(ValueError, match="nothing to report there"):
        find_runs([tmp_path])


def test_lengths_without_a_verdict_are_left_out() -> None:
    row = Outline(problem_id="a", difficulty=None, tokens={"y_o": 5, "y_r": 7}, y_o=None, y_r=True)
    assert [(r["response"], r["verdict"]) for r in lengths([row])] == [("y_r", "right")]
