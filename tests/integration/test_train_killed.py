"""`kill -9` of a rank at any moment of a save: the run goes on from the last complete one, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeAlias

import torch

from launch import ROOT
from megatron_trd.config.schema import MethodConfig
from megatron_trd.mcore.checkpoint_files import TRACKER, checkpoint_directory, latest_iteration, problems
from megatron_trd.records import Completion, Problem, Trajectory
from megatron_trd.rollout.refine import describe_refinement
from megatron_trd.rollout.trajectory_file import TrajectoryWriter
from tests.distributed.checkpoint_runs import stored_tensors

STUDENT = ROOT / "examples/quickstart_cpu/models/student"
ITERATIONS, KEPT = 8, 2
DEADLINE_S = 120
Moment: TypeAlias = tuple[str, Callable[..., bool]]
"""An audit event of Python, which comes before the system call, and which of them."""


def write_trajectories(path: Path) -> None:
    numbers = random.Random(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(3, 90) for _ in range(length))

    with TrajectoryWriter(path, {"mode": "opsd", "refinement": describe_refinement(MethodConfig())}) as writer:
        for i in range(16):
            y_o, y_r = (Completion(token_ids=ids(3 + i % 4), text="", finish_reason="stop") for _ in range(2))
            writer.append(
                Trajectory(
                    problem=Problem(id=f"p{i}", prompt="x", answer="1"),
                    y_o=y_o,
                    y_o_verdict=None,
                    solve_prompt_ids=ids(5),
                    vanilla_prompt_ids=ids(7),
                    y_r=y_r,
                    y_r_verdict=None,
                    refine_prompt_ids=ids(9),
                )
            )


def train(rank: int, store: Path, flags: list[str], victim: int, moment: Moment | None) -> None:
    """One rank of a run, as torchrun starts it. The victim kills itself right before what it does at the moment."""
    import torch.distributed as dist

    from megatron_trd.train import main

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == moment[0] and moment[1](*map(str, args)):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    if moment is not None and rank == victim:
        sys.addaudithook(watch)
    main(flags)


def run(run_dir: Path, trajectories: Path, *flags: str, victim: int = 0, moment: Moment | None = None) -> list[int]:
    """Run to the end, or to the victim's; return the exit codes."""
    run_dir.mkdir(exist_ok=True)
    store = run_dir / f"store{time.monotonic_ns()}"
    fixed = ["--hf-checkpoint", str(STUDENT), "--trajectories", str(trajectories), "--run-dir", str(run_dir)]
    fixed += ["--no-bf16", "--num-iterations", str(ITERATIONS), "--rollout-batch-size", "2", "--global-batch-size", "2"]
    fixed += ["--use-distributed-optimizer", "--diagnose-interval", "-1", "--lr", "1e-3"]
    context = multiprocessing.get_context("forkserver")  # whose server `launch` prepares
    calls = [(rank, store, [*fixed, *flags], victim, moment) for rank in range(2)]
    ranks = [context.Process(target=train, args=call) for call in calls]
    try:
        for process in ranks:
            process.start()
        wait([process.sentinel for process in ranks] if moment else [ranks[0].sentinel], DEADLINE_S)
        if moment is None:
            ranks[1].join(DEADLINE_S)
    finally:
        for process in ranks:  # torchrun too ends the others when one has died
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def writes_its_second_file(path: str, mode: str, flags: str) -> bool:
    return path.endswith("_1.distcp") and "iter_0000002" in path and mode[0] == "w"


def names_the_tracker(source: str, target: str, *_: str) -> bool:
    return target.endswith(TRACKER) and Path(source).read_text() == "4"


def deletes_an_old_one(path: str, *_: str) -> bool:
    return "/iter_0000005." in path


def test_a_rank_killed_during_a_save_costs_no_more_than_the_steps_since_the_last_one(tmp_path: Path) -> None:
    trajectories, straight, killed = (tmp_path / name for name in ("t.jsonl", "straight", "killed"))
    write_trajectories(trajectories)
    assert run(straight, trajectories) == [0, 0]
    root = killed / "checkpoints"
    saves = ["--save-interval", "1", "--keep-checkpoints", str(KEPT)]
    for victim, moment, flags, newest, left in (
        (1, ("open", writes_its_second_file), [], 1, {"1", "2.tmp"}),
        (0, ("os.rename", names_the_tracker), ["--async-save"], 3, {"2", "3", "4"}),
        (0, ("shutil.rmtree", deletes_an_old_one), ["--async-save"], 7, {"5.tmp", "6", "7"}),
    ):
        codes = run(killed, trajectories, *saves, *flags, victim=victim, moment=moment)
        assert codes[victim] == -signal.SIGKILL
        assert latest_iteration(root) == newest and problems(checkpoint_directory(root, newest)) == []
        found = {re.sub(r"iter_0*(\d+)(?:\.\w+(\.tmp))?", r"\1\2", path.name) for path in root.glob("iter_*")}
        assert found == left

    assert run(killed, trajectories, *saves, "--async-save") == [0, 0]
    compared = ("iteration", "step", "train/loss", "train/grad_norm", "train/lr", "distill/divergence")
    want, got = ([{tag: line[tag] for tag in compared} for line in lines(run_dir)] for run_dir in (straight, killed))
    assert got == want and want[0]["train/loss"] != want[-1]["train/loss"]
    kept = {checkpoint_directory(root, ITERATIONS - i).name for i in range(KEPT)}
    assert {path.name for path in root.iterdir()} == {TRACKER, *kept}
    ours, theirs = (stored_tensors(checkpoint_directory(d / "checkpoints", ITERATIONS)) for d in (killed, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
