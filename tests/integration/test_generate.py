"""Offline generation and evaluation through their mains' code, on a real server."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import launch
from megatron_trd import evaluate, generate
from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Trajectory
from megatron_trd.rollout.trajectory_file import read_trajectories
from megatron_trd.tasks.arithmetic import ArithmeticTask

NUM = 24


def config_for(url: str, student_dir: Path, seed: int = 1) -> Config:
    return Config(
        method=MethodConfig(mode="opsd"),
        model=ModelConfig(hf_checkpoint=str(student_dir)),
        data=DataConfig(seed=seed),
        rollout=RolloutConfig(student_urls=(url,), teacher_urls=(url,), max_response_tokens=40),
    )


def run(url: str, student_dir: Path, output: Path, *, num: int = NUM, seed: int = 1) -> dict[str, Trajectory]:
    assert asyncio.run(generate.generate(config_for(url, student_dir, seed), ArithmeticTask(), output, num)) == 0
    trajectories = list(read_trajectories(output))
    assert len({t.problem.id for t in trajectories}) == len(trajectories)
    return {t.problem.id: t for t in trajectories}


@pytest.fixture(scope="module")
def whole(server: str, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    path = tmp_path_factory.mktemp("whole") / "t.jsonl"
    done = run(server, student_dir, path)
    return path.read_bytes(), done


def test_trajectories_hold_the_very_ids_of_both_contexts(whole: Any, tokenizer: Any) -> None:
    task = ArithmeticTask()
    assert whole[1].keys() == {task.train_problem(i).id for i in range(NUM)}
    for t in whole[1].values():
        x, reference = t.problem.prompt, t.problem.reference_solution
        assert tokenizer.decode(t.solve_prompt_ids) == f"Q {x} A"
        assert tokenizer.decode(t.vanilla_prompt_ids) == f"Q {x} S {reference} A"
        assert tokenizer.decode(t.refine_prompt_ids) == f"Q {x} S {reference} Y {t.y_o.text} R"
        for completion, verdict in ((t.y_o, t.y_o_correct), (t.y_r, t.y_r_correct)):
            assert completion.finish_reason == "stop" and completion.token_ids[-1] == tokenizer.eos_token_id
            assert len(completion.logprobs) == len(completion.token_ids)
            assert verdict == task.grade(t.problem, completion.text, "stop").correct
    right = [sum(bool(getattr(t, stage)) for t in whole[1].values()) for stage in ("y_o_correct", "y_r_correct")]
    assert right[0] < right[1] == NUM  # the shipped teacher knows how to refine


@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_anywhere_resumes_to_the_same_trajectories(
    whole: Any, server: str, student_dir: Path, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(whole[0][: random.Random(seed).randrange(len(whole[0]))])
    resumed = run(server, student_dir, path)
    assert resumed.keys() == whole[1].keys()
    for key, t in resumed.items():
        full = whole[1][key]
        assert (t.y_o.token_ids, t.y_r.token_ids) == (full.y_o.token_ids, full.y_r.token_ids)
        assert t.refine_prompt_ids == full.refine_prompt_ids
    before = path.read_bytes()
    run(server, student_dir, path)  # nothing left to do
    assert path.read_bytes() == before
    assert len(run(server, student_dir, path, num=NUM + 5)) == NUM + 5  # more problems only append
    assert path.read_bytes().startswith(before)


def test_other_settings_refuse_the_file(whole: Any, server: str, student_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(whole[0])
    with pytest.raises(ValueError, match=r"line 1 was made otherwise: seed was '1' and is '2'; give another file"):
        run(server, student_dir, path, seed=2)
    assert path.read_bytes() == whole[0]


def test_mains(server: str, student_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--hf-checkpoint", str(student_dir), "--student-urls", server, "--max-response-tokens", "40"]
    out = tmp_path / "made/t.jsonl"
    generate.main([*common, "--teacher-urls", server, "--output", str(out), "--num-problems", "3"])
    assert len(list(read_trajectories(out))) == 3
    scores = tmp_path / "scores.json"
    evaluate.main([*common, "--eval-num-problems", "16", "--eval-num-samples", "4", "--output", str(scores)])
    result = json.loads(scores.read_text())
    verdicts = [verdict for row in result["correct"] for verdict in row]
    assert len(verdicts) == 64 and result["avg@4"] == pytest.approx(sum(verdicts) / 64)
    assert result["pass@4"] == pytest.approx(sum(map(any, result["correct"])) / 16)
    low, high = result["avg@4_interval"]
    assert 0 < low < result["avg@4"] < high < 1
    assert f"{100 * result['avg@4']:5.1f} %" in capsys.readouterr().out
    for main, flags, message in (
        (generate.main, [*common, "--teacher-urls", server], "--output (unset)"),
        (generate.main, [*common, "--teacher-urls", server, "--output", "x", "--task", "chess"], "--task chess"),
        (evaluate.main, [*common, "--eval-num-problems", "0"], "--eval-num-problems 0"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(flags)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_evaluate_waits_for_servers_no_longer_than_told(student_dir: Path) -> None:
    """Far below the default of a minute: a flag that is ignored runs into this test's own deadline."""
    flags = ["--hf-checkpoint", str(student_dir), "--student-urls", "http://127.0.0.1:9", "--server-timeout-s", "0"]
    result = launch.run([sys.executable, "-m", "megatron_trd.evaluate", *flags], timeout_s=45)
    assert result.returncode != 0 and "http://127.0.0.1:9 is down" in result.stderr
