"""The whole loop on real parts: servers, torchrun, Megatron, resync, export; and its ways to go wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import ROOT, run, torchrun
from megatron_trd.report import closing_table
from megatron_trd.rollout.server_process import launch_embedded_server

EXAMPLE = ROOT / "examples/quickstart_cpu"
STUDENT, TEACHER = EXAMPLE / "models/student", EXAMPLE / "models/teacher"
ONE = ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"]
QUICK = ["--num-iterations", "2", "--rollout-batch-size", "16", "--global-batch-size", "8", "--eval-num-problems", "0"]


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str, str]]:
    """Servers of the student (its weights change), of its first weights and of the OPD teacher."""
    with (
        launch_embedded_server(STUDENT) as student,
        launch_embedded_server(STUDENT) as initial,
        launch_embedded_server(TEACHER) as teacher,
    ):
        yield student, initial, teacher


def trainer(run_dir: Path, *flags: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
    return torchrun(nproc, *command(run_dir, *flags), timeout_s=240)


def command(run_dir: Path, *flags: str) -> list[str]:
    fixed = ["-m", "megatron_trd.train", "--config", str(EXAMPLE / "config.yaml"), "--hf-checkpoint", str(STUDENT)]
    return [*fixed, "--run-dir", str(run_dir), *flags]


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_quickstart_learns(tmp_path: Path) -> None:
    """The example's launcher with half its iterations: the gain shows, and everything it promises is there."""
    run_dir = tmp_path / "run"
    out = succeed(
        run(
            [sys.executable, str(EXAMPLE / "quickstart.py"), "--run-dir", str(run_dir), "--num-iterations", "6"],
            timeout_s=300,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        )
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["after"]["avg@8"] > summary["before"]["avg@8"] + 0.3
    assert summary["difference"]["interval"][0] > 0.2
    assert summary["after"]["pass@8"] >= summary["before"]["pass@8"]
    assert summary["y_r_pass"] > 0.9 > 0.6 > summary["y_o_pass"]
    assert sum(summary["outcomes"].values()) == 128
    assert summary["outcomes"]["pass_pass"] + summary["outcomes"]["pass_fail"] == round(128 * summary["y_o_pass"])
    assert summary["epistemic_mass"]["y_o"] > 10 * summary["epistemic_mass"]["y_r"]
    seconds = summary["seconds"]
    assert {"rollout", "train", "publish", "evaluate", "diagnose", "checkpoint"} <= seconds.keys()
    assert 0 < seconds["rollout, y_o"] + seconds["rollout, y_r"] <= seconds["rollout"]
    assert closing_table([summary]) in out

    lines = metrics(run_dir)
    assert [line["iteration"] for line in lines] == list(range(1, 7))
    assert max(line["weights/logprob_gap_max"] for line in lines) < 1e-3
    assert all(0 < line["weights/logprob_gap_mean"] <= line["weights/logprob_gap_max"] for line in lines)
    assert lines[-1]["train/loss"] < 0.5 * lines[0]["train/loss"]
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for tag in ("train/loss", "distill/divergence", "rollout/y_o_pass", "time/rollout_s", "perf/tokens_per_s_per_gpu"):
        assert [event.value for event in board.Scalars(tag)] == pytest.approx([line[tag] for line in lines], rel=1e-6)

    exported = run_dir / "student-hf"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(exported)("Q 6 +3 -4 +5 -6 +7 -8 +9 -2 A", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert model.config.eos_token_id in answer, "the end of the turn was not learned"
    served = load_file(run_dir / "weights/iter_0000006/model.safetensors")
    written = load_file(exported / "model.safetensors")
    assert served.keys() == written.keys() and all(torch.equal(served[k], written[k]) for k in served)


def test_killed_run_resumes_to_the_last_digit(urls, tmp_path: Path) -> None:
    student, initial, _ = urls
    flags = ["--student-urls", student, "--teacher-urls", initial, *QUICK, "--num-iterations", "5"]
    flags += ["--save-interval", "1", "--use-distributed-optimizer", *ONE]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeed(trainer(straight, *flags))

    last = random.Random(os.getpid()).randint(1, 4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", "2", *command(killed, *flags)]
    process = psutil.Popen(launcher, cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and len(metrics_so_far(killed)) >= last:
            break
        time.sleep(0.02)
    assert process.poll() is None, f"the run ended before iteration {last}"
    everyone = [process, *process.children(recursive=True)]  # torchrun gives each rank a session of its own
    assert len(everyone) >= 3
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone)
    assert len(metrics_so_far(killed)) < 5

    succeed(trainer(killed, *flags, "--resume", "auto"))
    compared = ("iteration", "step", "train/loss", "train/grad_norm", "train/lr", "distill/divergence")
    want, got = ([{tag: line[tag] for tag in compared} for line in metrics(d)] for d in (straight, killed))
    assert got == want, f"killed after iteration {last}"
    final = "weights/iter_0000005/model.safetensors"
    ours, theirs = load_file(straight / final), load_file(killed / final)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics_so_far(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def test_opd_with_lora_exports_merged_weights_and_the_adapter(urls, tmp_path: Path) -> None:
    student, _, teacher = urls
    flags = ["--mode", "opd", "--teacher-hf-checkpoint", str(TEACHER), "--student-urls", student, "--teacher-urls"]
    flags += [teacher, *QUICK, "--lora-rank", "4", "--lora-alpha", "8", "--lora-dropout", "0.05", "--lr", "1e-2"]
    flags += ["--save-hf", str(tmp_path / "hf"), "--save-adapter", str(tmp_path / "adapter")]
    succeed(trainer(tmp_path / "run", *flags))
    base, merged = load_file(STUDENT / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and len(config["target_modules"]) == 7
    assert len(adapter) == 2 * 7 * 3
    changed = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            update = config["lora_alpha"] / config["r"] * adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
            assert update.norm() > 0
            changed += 1
            torch.testing.assert_close(merged[name], weight.float() + update, atol=1e-6, rtol=0)
        else:
            assert torch.equal(merged[name], weight.float()), name
    assert changed == 7 * 3
    assert max(line["weights/logprob_gap_max"] for line in metrics(tmp_path / "run")) < 1e-3


def test_offline_recipe(urls, tmp_path: Path) -> None:
    """Trajectories to a file, then training from it without any server."""
    _, initial, _ = urls
    file = tmp_path / "trajectories.jsonl"
    generate = [sys.executable, "-m", "megatron_trd.generate", "--config", str(EXAMPLE / "config.yaml")]
    generate += ["--hf-checkpoint", str(STUDENT), "--student-urls", initial, "--teacher-urls", initial]
    succeed(run([*generate, "--output", str(file), "--num-problems", "32"], timeout_s=120, env=environment()))
    assert len(file.read_text().splitlines()) == 32
    succeed(trainer(tmp_path / "run", "--trajectories", str(file), *QUICK))
    lines = metrics(tmp_path / "run")
    assert [line["rollout/usable_samples"] for line in lines] == [16, 16]
    assert "server/ready" not in lines[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "before" not in summary and summary["consumed_samples"] == 32

    broken = tmp_path / "broken.jsonl"
    first, second, *_ = file.read_text().splitlines(keepends=True)
    broken.write_text(first + second[:50] + "\n")
    no = tmp_path / "no"
    refused(trainer(no, "--trajectories", str(broken), *ONE, nproc=1), f"error: {broken}:2: not valid JSON")
    opd = ["--mode", "opd", "--teacher-hf-checkpoint", str(TEACHER), *ONE]
    refused(trainer(no, "--trajectories", str(file), *opd, nproc=1), f"error: --mode opd: {file} was made with")


def refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode != 0
    assert message in result.stderr, result.stderr[-3000:]


def test_server_that_is_down(tmp_path: Path) -> None:
    flags = ["--student-urls", "http://127.0.0.1:9", "--teacher-urls", "http://127.0.0.1:9", "--server-timeout-s", "1"]
    result = trainer(tmp_path, *flags, *QUICK, *ONE, nproc=1)
    refused(result, "Start the server or correct --student-urls/--teacher-urls")
    assert "http://127.0.0.1:9" in result.stderr


def test_start_without_torchrun(tmp_path: Path) -> None:
    result = run([sys.executable, *command(tmp_path, "--trajectories", "t.jsonl")])
    refused(result, "error: start it with torchrun --nproc-per-node N")


def test_missing_checkpoint(tmp_path: Path) -> None:
    flags = ["--student-urls", "http://x", "--teacher-urls", "http://x", "--resume", "require", *QUICK, *ONE]
    refused(trainer(tmp_path, *flags, nproc=1), "error: --resume require: there is no checkpoint in")


def test_prompt_that_is_too_long(urls, tmp_path: Path) -> None:
    flags = ["--student-urls", urls[0], "--teacher-urls", urls[1], "--max-prompt-tokens", "5", *QUICK, *ONE]
    refused(trainer(tmp_path, *flags, nproc=1), "error: --max-prompt-tokens 5: the prompt of problem")


def test_zero_usable_samples_skip_the_update_and_are_counted(urls, tmp_path: Path) -> None:
    """Every y_r is cut off by a tiny budget: the run goes on, without a step, and says so."""
    flags = ["--student-urls", urls[0], "--teacher-urls", urls[1], *QUICK, *ONE]
    flags += ["--max-response-tokens", "2", "--on-bad-refinement", "drop", "--num-iterations", "1"]
    result = trainer(tmp_path, *flags, nproc=1)
    succeed(result)
    (line,) = metrics(tmp_path)
    assert line["rollout/bad_y_r_dropped"] == 16 and line["rollout/usable_samples"] == 0
    assert line["step"] == 0 and "train/loss" not in line
    assert "zero usable samples" in result.stderr
    before, after = (
        load_file(STUDENT / "model.safetensors"),
        load_file(tmp_path / "weights/iter_0000001/model.safetensors"),
    )
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
