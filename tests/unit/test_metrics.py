from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import spawn
from megatron_trd.metrics import MetricSums, Reporter, StageClock, console_line


def test_sums_divide_once_and_missing_is_missing() -> None:
    sums = MetricSums(("kl", "clip", "never"))
    sums.add("kl", torch.tensor(3.0, requires_grad=True), 1)
    sums.add("kl", torch.tensor([0.5], dtype=torch.bfloat16).sum(), torch.tensor(6))
    sums.add("clip", 0.0, 4.0)
    assert sums.reduce() == {"kl": 0.5, "clip": 0.0}  # the mean of means would be 1.54
    with pytest.raises(KeyError):
        sums.add("unknown", 1.0, 1.0)


def test_sums_are_fp64() -> None:
    sums = MetricSums(("loss",))
    for _ in range(1000):
        sums.add("loss", torch.tensor(0.1), 1.0)
    assert math.isclose(sums.reduce()["loss"], float(torch.tensor(0.1)), rel_tol=1e-13)


def _unequal_shares(rank: int, world_size: int) -> dict[str, float]:
    sums = MetricSums(("tokens", "rank0_only", "nobody"))
    for i in range(rank + 1):
        sums.add("tokens", float(10 * rank + i), rank + 1)
    if rank == 0:
        sums.add("rank0_only", 7.0, 2.0)
    first = sums.reduce()
    assert sums.reduce() == first  # reducing leaves the local sums alone
    return first


def test_one_reduction_over_ranks_with_unequal_shares() -> None:
    # Numerators 0, 10 + 11, 20 + 21 + 22; denominators 1, 2 + 2, 3 + 3 + 3.
    assert spawn(_unequal_shares, 3) == [{"tokens": 84 / 14, "rank0_only": 3.5}] * 3


def test_stage_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("megatron_trd.metrics.time.perf_counter", lambda: next(now))
    clock = StageClock()
    with clock("rollout"):
        pass
    assert clock.lap() == {"rollout": 2.0}
    with pytest.raises(OSError), clock("rollout"):
        raise OSError
    with clock("train"):
        pass
    assert clock.lap() == {"rollout": 3.0, "train": 0.5}
    assert clock.totals == {"rollout": 5.0, "train": 0.5}


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_repeated_iteration_appears_once(tmp_path: Path) -> None:
    killed = Reporter(tmp_path)
    for iteration in (1, 2, 3):
        killed.report(iteration, 2 * iteration, {"train/loss": 1.0 / iteration})
    assert len(lines(tmp_path)) == 3  # flushed without a close
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"iteration": 4, "ste')
    killed.close()
    resumed = Reporter(tmp_path)
    resumed.rewind(1)
    resumed.report(2, 4, {"train/loss": 8.0, "distill/kl_forward": 0.25})
    resumed.close()
    assert lines(tmp_path) == [
        {"iteration": 1, "step": 2, "train/loss": 1.0},
        {"iteration": 2, "step": 4, "train/loss": 8.0, "distill/kl_forward": 0.25},
    ]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 8.0)]


def test_a_new_run_in_an_old_directory_starts_over(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        reporter = Reporter(tmp_path)
        reporter.report(1, 1, {"train/loss": loss})
        reporter.close()
    assert lines(tmp_path) == [{"iteration": 1, "step": 1, "train/loss": 2.0}]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        Reporter(tmp_path).rewind(5)


def test_console_line_leaves_out_what_is_missing() -> None:
    metrics = {
        "train/loss": 0.01234,
        "rollout/y_r_pass": 0.875,
        "eval/arithmetic/avg@8": 0.5,
        "distill/kl_forward": 1.0,
        "time/rollout_s": 1.25,
        "time/train_s": 2.0,
    }
    assert console_line(3, 12, metrics) == (
        " iteration        3/      12 | loss: 1.2340E-02 | y_r pass: 87.5% | arithmetic/avg@8: 50.0%"
        " | elapsed time (s): 3.2 |"
    )
