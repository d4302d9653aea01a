"""Mixtures of experts on every kind of grid against the fp64 dense reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch import spawn
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.grid_case import GridCase, check_grids, pairs_of, pairs_on
from tiny_models import make_model


@dataclass(frozen=True)
class Case(GridCase):
    ep: int = 1
    etp: int = 1
    mixed: bool = False
    """Some layers are dense, and the weights of a token's experts do not sum to one."""
    teacher_only: bool = False
    """The student is dense."""

    @property
    def parallel(self) -> ParallelConfig:
        return replace(super().parallel, expert_model_parallel_size=self.ep, expert_tensor_parallel_size=self.etp)


CASES = [
    Case(ep=2, tp=2, sp=True, pp=2, vpp=2, recompute=True, mixed=True),
    Case(ep=2, etp=2, tp=2, sp=True, dp=2, distopt=True, overlap=True, opsd=True),
    Case(ep=2, pp=2, dp=2, distopt=True, lora=True, recompute=True),
    Case(ep=2, tp=2, sp=True, cp=2, lora=True, mixed=True),
    Case(ep=2, pp=2, dp=2, distopt=True, overlap=True, mixed=True),  # experts on the second stage alone
    Case(ep=2, pp=2, teacher_only=True, dp=2),
    Case(tp=2, sp=True, dp=2),  # copies of every expert on ranks that share the attention
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "sparse", family="qwen3_moe", layers=4, seed=1)
    make_model(
        root / "mixed",
        family="qwen3_moe",
        layers=4,
        seed=3,
        tied=False,
        mlp_only_layers=[0, 1],
        norm_topk_prob=False,
    )
    make_model(root / "dense", tied=False, hidden=48, layers=4, seed=2)
    return root


def test_pairs_of_settings_are_covered() -> None:
    on = {setting for case in CASES for setting in case.on}
    wanted = pairs_of(("ep", "tp", "pp", "dp", "distopt", "lora")) | {frozenset(("ep", o)) for o in on - {"ep"}}
    assert not wanted - pairs_on(CASES)


def test_loss_and_gradients_equal_the_dense_reference(models: Path) -> None:
    assert {case.world_size for case in CASES} == {4}
    grids = []
    for case in CASES:
        student = models / ("dense" if case.teacher_only else "mixed" if case.mixed else "sparse")
        teacher = student if case.opsd else models / ("sparse" if case.teacher_only else "dense")
        grids.append((case, student, teacher))
    spawn(check_grids, 4, grids, ObjectiveConfig(), timeout_s=400)
