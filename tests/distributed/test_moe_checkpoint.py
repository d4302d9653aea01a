"""Runs with experts go on as if they had never stopped, with their experts on other ranks too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import spawn
from tests.distributed.checkpoint_runs import DISTOPT, PP2, TP2, open_run
from tiny_models import make_model

EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
WHOLE = {"expert_tensor_parallel_size": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_model(path, family="qwen3_moe", num_experts=4, layers=4, mlp_only_layers=[0, 1])


def save_train_and_resume(rank, world, model, root, grids):
    """Save after two steps; train two more; resume on the last grid and train them again; return both."""
    run = open_run(model, grids[0])
    checkpoints = run.checkpoints(root)
    for number in range(2):
        run.step(number)
    checkpoints.save(run.student, {"iteration": 2})
    straight = [run.step(number) for number in range(2, 4)]
    again = open_run(model, grids[-1])
    again.checkpoints(root).resume(again.student)
    return straight, [again.step(number) for number in range(2, 4)]


@pytest.mark.parametrize(
    ("world", "grids"),
    [
        (2, [{**EP2, **DISTOPT}]),
        (2, [EP2, {**TP2, **WHOLE, **DISTOPT}]),
        (4, [{**PP2, **EP2, **DISTOPT}, {**TP2, **EP2}]),  # experts on the second stage alone, then on all ranks
    ],
    ids=["same", "whole", "stages"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(model: Path, tmp_path: Path, world, grids) -> None:
    for straight, resumed in spawn(save_train_and_resume, world, str(model), str(tmp_path), grids, timeout_s=200):
        assert straight[0][0] != straight[1][0]
        if len(grids) == 1:
            assert resumed == straight
        else:
            torch.testing.assert_close(torch.tensor(resumed), torch.tensor(straight), rtol=1e-4, atol=1e-7)
