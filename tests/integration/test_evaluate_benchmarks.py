"""Benchmarks on a real server: killed and resumed, other weights refused, two models compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chain_corpus import TOY, ChainTask, write_chains
from launch import ROOT
from megatron_trd import evaluate
from megatron_trd.benchmarks.samples_file import Row, read_samples
from megatron_trd.estimators import paired_differences
from megatron_trd.rollout.server_process import launch_embedded_server
from megatron_trd.tasks import TASKS

SIZES = {"easy": 5, "hard": 3}
NUM = 16
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chains(tmp_path_factory.mktemp("benchmarks") / "data", **SIZES)


@pytest.fixture(scope="module")
def own_server(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of a copy of the student, whose weights these tests change."""
    directory = tmp_path_factory.mktemp("own") / "model"
    shutil.copytree(student_dir, directory)
    with launch_embedded_server(directory) as url:
        yield url, directory


def flags(url: str, model: Path, data: Path, output: Path, num: int = NUM, **changed: str) -> list[str]:
    given = {
        "hf-checkpoint": str(model),
        "student-urls": url,
        "benchmark-dir": str(data),
        "eval-num-samples": str(num),
        "eval-max-response-tokens": "40",
        "max-concurrent-requests": "4",
        "output": str(output),
        **changed,
    }
    return ["--benchmarks", *SIZES, *(part for name, value in given.items() for part in (f"--{name}", value))]


def run(*arguments: Any, **changed: str) -> dict[tuple[str, str, int], Row]:
    evaluate.main(flags(*arguments, **changed), tasks={**TASKS, "chain": ChainTask})
    return samples(arguments[3])


def samples(directory: Path) -> dict[tuple[str, str, int], Row]:
    """Return all rows without the seconds that they took."""
    return {row.key: replace(row, seconds=0.0) for row in read_samples(directory)}


@pytest.fixture(scope="module")
def whole(own_server: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that was made in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(*own_server, data, output)
    return output


def test_rows_and_scores(whole: Path, tokenizer: Any) -> None:
    rows = samples(whole)
    problems = {problem.id: problem for problem in TOY.eval_problems(sum(SIZES.values()))}
    assert len(rows) == NUM * len(problems) and len({row.seed for row in rows.values()}) == len(rows)
    for row in rows.values():
        problem = problems[row.problem_id]
        assert row.prompt_tokens == len(tokenizer(f"Q {problem.prompt} A")["input_ids"])
        assert row.verdict == TOY.grade(problem, row.response, row.finish_reason).outcome
        assert row.response_tokens == len(tokenizer(row.response)["input_ids"]) + (row.finish_reason == "stop")
    summary = json.loads((whole / "summary.json").read_text())
    for name, size in SIZES.items():
        right = sum(row.verdict == "correct" for row in rows.values() if row.bench == name)
        found = summary["benchmarks"][name]
        assert found[f"avg@{NUM}"] == pytest.approx(right / size / NUM) and found["missing"] == 0
    assert 0 < summary["macro"][f"avg@{NUM}"] < 1


def test_a_killed_evaluation_resumes_to_the_same_samples(
    own_server: Any, data: Path, whole: Path, tmp_path: Path
) -> None:
    output, path = tmp_path / "out", tmp_path / "out/samples.jsonl"
    command = [sys.executable, str(ROOT / "tests/chain_corpus.py"), *flags(*own_server, data, output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not path.is_file() or path.read_bytes().count(b"\n") < 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    killed = path.read_bytes()
    assert 8 <= killed.count(b"\n") < NUM * sum(SIZES.values())
    path.write_bytes(killed[:-3])  # and the last line came only in part to the disk
    assert run(*own_server, data, output) == samples(whole)
    assert path.read_bytes().startswith(killed[: killed[:-3].rfind(b"\n") + 1])


def test_more_samples_join_and_other_sampling_is_refused(
    own_server: Any, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    few = run(*own_server, data, output, 1)
    assert few == {key: row for key, row in samples(whole).items() if key[2] < 1}
    more = run(*own_server, data, output, 3)
    assert more == {key: row for key, row in samples(whole).items() if key[2] < 3}
    with pytest.raises(SystemExit):
        run(*own_server, data, output, 3, **{"eval-sampling": "qwen3"})
    assert "sampling was T 0.6, top-p 0.95, top-k 20 and is T 0.7, top-p 0.8, top-k 20" in capsys.readouterr().err
    assert samples(output) == more


def test_requests_that_all_fail_are_an_error_that_says_why(own_server: Any, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="error: easy: 10 of 10 requests failed, .* context"):
        run(*own_server, data, output, 2, **{"eval-max-response-tokens": "4000"})
    assert samples(output) == {}


def test_other_weights_under_the_same_name_are_refused_and_two_models_compared(
    own_server: Any, data: Path, whole: Path, other_dir: Path, tmp_path: Path, post: Any, capsys: Any
) -> None:
    url, directory = own_server
    shutil.copyfile(other_dir / "model.safetensors", directory / "model.safetensors")
    body = {"model_path": str(directory), "weight_version": "default"}
    assert post(url, "/update_weights_from_disk", body)[0] == 200
    before = (whole / "samples.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(url, directory, data, whole)
    error = capsys.readouterr().err
    assert f"--output {whole}: was made otherwise: weights was" in error and "model was" not in error
    assert (whole / "samples.jsonl").read_bytes() == before

    output = tmp_path / "other"
    run(url, directory, data, output)
    evaluate.main(["--compare", str(whole), str(output), "--output", str(tmp_path / "difference.json")])
    found = json.loads((tmp_path / "difference.json").read_text())
    rows = [samples(side) for side in (whole, output)]
    assert rows[0].keys() == rows[1].keys() and all(rows[0][key].seed == rows[1][key].seed for key in rows[0])
    for name in SIZES:
        problems = sorted({key[1] for key in rows[0] if key[0] == name})
        verdicts = [[[side[name, problem, i].passed for i in range(NUM)] for problem in problems] for side in rows]
        differences = paired_differences(*verdicts)
        assert found["differences"][name]["mean"] == pytest.approx(sum(differences) / len(differences))
    assert found["differences"]["macro average"]["mean"] < 0  # the disturbed model is worse
    assert [line.split()[0] for line in found["settings"]] == ["weights"]
