"""Rollouts ahead of training on real parts: the process of their own, its bound, and its ways to end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from launch import ROOT, torchrun
from megatron_trd.config.cli import parse_config
from megatron_trd.config.schema import Config
from megatron_trd.records import Completion
from megatron_trd.rollout.ahead import ObservedServers, RolloutProcess, RolloutProcessError
from megatron_trd.rollout.refine import RolloutBatch
from megatron_trd.rollout.server_process import launch_embedded_server
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.staleness import iteration_of, weight_version
from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.weight_sync.disk import DiskWeightSync

EXAMPLE = ROOT / "examples/quickstart_cpu"
STUDENT = EXAMPLE / "models/student"
DEADLINE_S = 120.0
BATCH = 48
RECORDING_SCRIPT = '''
import os
from megatron_trd import train
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.arithmetic import ArithmeticTask

class Recorded(ArithmeticTask):
    """Writes down which process draws which problem."""

    def train_problem(self, index):
        with open(os.environ["DRAWN"], "a") as file:
            file.write(f"{os.getpid()} {index}\\n")
        return super().train_problem(index)

class Locked(ArithmeticTask):
    def __init__(self, data):
        super().__init__()
        self.connection = open(os.devnull)

if __name__ == "__main__":
    class Hidden(ArithmeticTask):
        pass

    train.main(
        tasks={**TASKS, "recorded": lambda data: Recorded(), "locked": Locked, "hidden": lambda data: Hidden()}
    )
'''


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """Servers of the student and of the teacher, OPSD's first weights."""
    with launch_embedded_server(STUDENT) as student, launch_embedded_server(STUDENT) as teacher:
        yield student, teacher


def flags(urls: tuple[str, str], run_dir: Path, *more: str) -> list[str]:
    fixed = ["--config", str(EXAMPLE / "config.yaml"), "--hf-checkpoint", str(STUDENT), "--run-dir", str(run_dir)]
    return [*fixed, "--student-urls", urls[0], "--teacher-urls", urls[1], "--rollout-staleness", "1", *more]


# ------------------------------------------------------------------ the process alone


@pytest.fixture(scope="module")
def config(urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Config:
    small = ["--rollout-batch-size", str(BATCH), "--global-batch-size", str(BATCH), "--max-concurrent-requests", "4"]
    return parse_config(flags(urls, tmp_path_factory.mktemp("run"), *small))


def train_nothing(config: Config, process: RolloutProcess, weights: list[dict[str, Any]]) -> Iterator[RolloutBatch]:
    """Do what the trainer does to the world, for ever: publish version i, take batch i."""

    async def publish(version: int) -> None:
        async with SGLangFleet(config.rollout.student_urls) as fleet:
            await fleet.wait_healthy()
            directory = Path(config.checkpoint.run_dir) / "weights"
            sync = DiskWeightSync(directory, STUDENT, ObservedServers(fleet, process), timeout_s=60)
            await sync.publish(weights[version % len(weights)].items(), weight_version(version))

    for iteration in count():
        asyncio.run(asyncio.wait_for(publish(iteration), DEADLINE_S))
        yield process.batch(iteration, BATCH * iteration)


def test_batches_come_in_order_and_no_token_is_older_than_the_bound(
    config: Config, other_dir: Path, hf_student: torch.nn.Module
) -> None:
    """Two sets of weights by turns: the log-probabilities of each token tell which of them sampled it."""
    other = AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32).eval()
    weights = [{n: w.float() for n, w in load_file(d / "model.safetensors").items()} for d in (STUDENT, other_dir)]
    process = RolloutProcess(config, ArithmeticTask())
    try:
        process.wait_ready()
        batches = []
        for batch in islice(train_nothing(config, process, weights), 12):
            batches.append(batch)
            if len(batches) >= 4 and any(map(is_mixed, batches)):  # a slow publication may miss a whole batch
                break
    finally:
        process.close()
    assert not psutil.pid_exists(process.pid or 0)
    asyncio.run(asyncio.wait_for(require_idle(config), DEADLINE_S))  # the next was under way, and has been called back

    drawn = [t.problem.id for batch in batches for t in batch.trajectories]
    assert drawn == [ArithmeticTask().train_problem(index).id for index in range(len(batches) * BATCH)]
    for iteration, batch in enumerate(batches):
        ages = []
        for trajectory in batch.trajectories:
            y_o = trajectory.y_o
            versions = versions_of_tokens(y_o)
            ages.append(iteration - min(versions))
            assert ages[-1] <= 1
            assert trajectory.y_r is not None and trajectory.y_r.finish_reason != "abort"
            rows = [logprobs(model, trajectory.solve_prompt_ids, y_o, config) for model in (hf_student, other)]
            want = [float(rows[version % 2][i]) for i, version in enumerate(versions)]
            assert y_o.logprobs == pytest.approx(want, abs=2e-4)
            assert set(versions) <= {iteration - 1, iteration}
        tags = batch.metrics()
        assert tags["rollout/staleness_mean"] == pytest.approx(sum(ages) / BATCH)
        assert tags["rollout/staleness_max"] == max(ages) and tags["rollout/redone_stale"] == 0
        assert tags["rollout/trajectories"] == BATCH
    assert {v for t in batches[0].trajectories for v in versions_of_tokens(t.y_o)} == {0}
    assert any(map(is_mixed, batches)), "no completion lived through a publication"


def is_mixed(batch: RolloutBatch) -> bool:
    return any(len(trajectory.y_o.weight_spans) > 1 for trajectory in batch.trajectories)


def versions_of_tokens(completion: Completion) -> list[int]:
    versions = [iteration_of(s.version) for s in completion.weight_spans for _ in range(s.start, s.end)]
    assert len(versions) == len(completion.token_ids) and None not in versions
    return [version for version in versions if version is not None]


@torch.no_grad()
def logprobs(model: torch.nn.Module, prompt: tuple[int, ...], y: Completion, config: Config) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *y.token_ids]])).logits[0, len(prompt) - 1 : -1]
    rows = (logits / config.rollout.rollout_temperature).log_softmax(-1)
    return rows[range(len(y.token_ids)), list(y.token_ids)]


async def require_idle(config: Config) -> None:
    async with SGLangFleet(config.rollout.student_urls) as fleet:
        await asyncio.gather(*(server.flush() for server in fleet.servers))


def test_a_dead_process_and_a_failing_batch_are_told_apart(config: Config) -> None:
    process = RolloutProcess(config, Picky())
    try:
        process.wait_ready()
        weights = {n: w.float() for n, w in load_file(STUDENT / "model.safetensors").items()}
        with pytest.raises(RolloutProcessError, match="KeyError: 'no such problem'"):
            next(train_nothing(config, process, [weights]))
        psutil.Process(process.pid).kill()
        with pytest.raises(RolloutProcessError, match=rf"\(pid {process.pid}\) died with exit code -9"):
            process.batch(1, BATCH)
    finally:
        process.close()


class Picky(ArithmeticTask):
    """Has no problems."""

    def train_problem(self, index: int) -> Any:
        raise KeyError("no such problem")


# ------------------------------------------------------------------ whole runs


QUICK = ["--rollout-batch-size", "16", "--global-batch-size", "8", "--eval-num-problems", "0", "--task", "recorded"]
ONE = ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_training.py"
    path.write_text(RECORDING_SCRIPT)
    return path


@contextmanager
def running(nproc: int, script: Path, arguments: list[str]) -> Iterator[tuple[psutil.Popen, IO[str]]]:
    """A run under way, and what it writes to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(nproc), str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DRAWN": str(script.with_name("drawn"))}
    with tempfile.TemporaryFile("w+") as stderr:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield process, stderr
        finally:
            kill([process, *(process.children(recursive=True) if process.is_running() else [])])


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def wait_for_iterations(run_dir: Path, num: int, process: psutil.Popen, stderr: IO[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").read_text().count("\n") >= num:
            return
        time.sleep(0.02)
    stderr.seek(0)
    raise AssertionError(f"no {num} iterations within {DEADLINE_S} s:\n{stderr.read()[-3000:]}")


def drawn(script: Path) -> dict[int, list[int]]:
    """Return the problems that each process drew, in order; trainers, who look at the first one, are left out."""
    by_process: dict[int, list[int]] = {}
    for line in script.with_name("drawn").read_text().splitlines():
        pid, index = map(int, line.split())
        by_process.setdefault(pid, []).append(index)
    return {pid: indices for pid, indices in by_process.items() if indices != [0]}


def test_a_killed_run_takes_its_rollouts_along_and_resumes(urls: tuple[str, str], script: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = flags(urls, run_dir, *QUICK, "--num-iterations", "4", "--save-interval", "1")
    with running(2, script, arguments) as (launcher, stderr):
        wait_for_iterations(run_dir, 2, launcher, stderr)
        (worker,) = map(psutil.Process, drawn(script))
        everyone = [launcher, *launcher.children(recursive=True)]
        assert worker in everyone
        kill([process for process in everyone if process != worker and process.is_running()])
        worker.wait(30)
    first = drawn(script).popitem()[1]
    assert first == list(range(len(first))) and len(first) in (48, 64), "one iteration ahead of the last"

    result = torchrun(2, script, *arguments, timeout_s=240, env={"DRAWN": str(script.with_name("drawn"))})
    assert result.returncode == 0, result.stderr[-4000:]
    done = next(i for i in range(1, 5) if f"resumed after iteration {i} " in result.stderr)
    second = drawn(script).popitem()[1]
    assert second == list(range(16 * done, 64)), "from the cursor on, each problem once, in order"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["step"]) for line in lines] == [(i, 2 * i) for i in range(1, 5)]
    assert all(0 <= line["rollout/staleness_mean"] <= line["rollout/staleness_max"] <= 1 for line in lines)
    assert lines[0]["rollout/staleness_max"] == 0 and lines[-1]["rollout/staleness_max"] == 1
    assert all(line["rollout/redone_stale"] == 0 for line in lines)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("rollout/staleness_mean")] == pytest.approx(
        [line["rollout/staleness_mean"] for line in lines]
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["consumed_samples"] == 64
    assert summary["staleness"]["max"] == 1 and summary["staleness"]["redone"] == 0
    assert "staleness in iterations" in result.stdout and ", at most 1" in result.stdout
    for iteration in range(done + 1, 4):  # the evidence of overlap
        began = result.stderr.index(f"rollout of iteration {iteration + 1} begins with weights {iteration - 1}")
        assert began < result.stderr.index(f"iteration {iteration} is trained")


def test_a_dead_rollout_process_ends_the_run_by_name(urls: tuple[str, str], script: Path, tmp_path: Path) -> None:
    arguments = flags(urls, tmp_path / "run", *QUICK, *ONE, "--num-iterations", "1000")
    with running(1, script, arguments) as (launcher, stderr):
        wait_for_iterations(tmp_path / "run", 1, launcher, stderr)
        (worker,) = map(psutil.Process, drawn(script))
        worker.kill()
        assert launcher.wait(timeout=60) != 0
        stderr.seek(0)
        assert f"RolloutProcessError: the rollout process (pid {worker.pid}) died with exit code -9" in stderr.read()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("locked", "error: --rollout-staleness 1: task 'arithmetic' cannot be sent to the process that rolls out"),
        ("hidden", "error: --task hidden: the rollout process cannot make it"),
    ],
)
def test_a_task_that_cannot_travel(
    urls: tuple[str, str], script: Path, tmp_path: Path, task: str, message: str
) -> None:
    arguments = flags(urls, tmp_path / "run", *QUICK, *ONE, "--task", task)
    result = torchrun(1, script, *arguments, env={"DRAWN": str(script.with_name("drawn"))})
    assert result.returncode != 0
    assert message in result.stderr, result.stderr[-2000:]
    assert "use --rollout-staleness 0" in result.stderr
