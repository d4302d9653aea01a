"""Tensor, sequence, pipeline (interleaved too), context and data parallelism against the fp64 dense reference.

The cases cover every pair of settings that four ranks allow.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from launch import spawn
from megatron_trd.config.schema import ObjectiveConfig
from tests.distributed.grid_case import GridCase, check_grids, pairs_of, pairs_on
from tiny_models import make_model


@dataclass(frozen=True)
class Case(GridCase):
    untied: bool = False


CASES = [
    Case(tp=2, sp=True, pp=2, vpp=2, opsd=True, untied=True, recompute=True),
    Case(tp=2, sp=True, cp=2, untied=True, lora=True, recompute=True),
    Case(tp=2, sp=True, dp=2, distopt=True, overlap=True, opsd=True, untied=True),
    Case(pp=2, vpp=2, cp=2, lora=True, opsd=True, distopt=True, overlap=True),
    Case(pp=2, vpp=2, dp=2, distopt=True, overlap=True, recompute=True),
    Case(cp=2, dp=2, distopt=True, overlap=True, opsd=True, untied=True, recompute=True),
    Case(tp=2, sp=True, dp=2, distopt=True, lora=True, recompute=True, overlap=True),
    Case(tp=2, pp=2, untied=True, lora=True, opsd=True),
    Case(pp=2),
    Case(cp=2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "tied", tied=True, layers=4, seed=1)
    make_model(root / "untied", tied=False, layers=4, seed=3)
    make_model(root / "teacher", tied=False, hidden=48, layers=4, seed=2)
    return root


def test_every_pair_of_settings_is_covered() -> None:
    settings = [f.name for f in fields(Case)]
    assert not pairs_of(settings) - pairs_on(CASES)
    assert all(any(setting not in case.on for case in CASES) for setting in settings)


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_equal_the_dense_reference(models: Path, world: int) -> None:
    grids = []
    for case in CASES:
        student = models / ("untied" if case.untied else "tied")
        if case.world_size == world:
            grids.append((case, student, student if case.opsd else models / "teacher"))
    spawn(check_grids, world, grids, ObjectiveConfig(token_clip=3.0), timeout_s=400)
