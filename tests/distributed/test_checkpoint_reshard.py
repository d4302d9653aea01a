"""What any layout of ranks saves, every other one loads: weights, fp32 values and both moments, to the last bit.

Each layout reads what the layout before it in the list wrote, writes what arrived, and trains on. The checkpoints hold
whole tensors, so if all of them are equal, every layout reads every other one's; training on like the reference rules
out that a layout reads and writes wrong in the same way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import spawn
from tests.distributed.checkpoint_runs import CP2, DISTOPT, OVERLAP, PP2, TP2, VPP2, open_run, stored_tensors
from tiny_models import make_model

# (world size, grids): what the model does not share is data-parallel.
FP32 = [
    (1, [DISTOPT]),
    (2, [{}, DISTOPT, TP2, PP2]),
    (3, [DISTOPT]),
    (4, [{**TP2, **DISTOPT}, {**VPP2, **OVERLAP}, {**CP2, **DISTOPT}, {**TP2, **PP2}, OVERLAP]),
    (1, [{}]),
]
BF16 = [(2, [DISTOPT, {}, {**PP2, **DISTOPT}])]
SAVED = "checkpoints/iter_0000002"


def reference(rank, world, model, root, bf16):
    """Two steps, a checkpoint, two more steps."""
    run = open_run(model, {}, bf16=bf16)
    for number in range(2):
        run.step(number)
    run.checkpoints(root).save(run.student, {"iteration": 2})
    return [run.step(number) for number in range(2, 4)]


def visit(rank, world, model, source, directories, grids, bf16):
    numbers = []
    for directory, grid in zip(directories, grids, strict=True):
        run = open_run(model, grid, bf16=bf16)
        run.checkpoints(source).resume(run.student)
        run.checkpoints(directory).save(run.student, {"iteration": 2})
        numbers.append([run.step(number) for number in range(2, 4)])
        source = directory
    return numbers


def values(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors under the same names, whichever optimizer saved them: each parameter has an fp32 value."""
    tensors = {key.replace(".state.param.", ".state.fp32_param."): t for key, t in stored_tensors(directory).items()}
    for key in [key for key in tensors if not key.startswith("optimizer.")]:
        tensors.setdefault(f"optimizer.state.fp32_param.{key}", tensors[key])
    return tensors


@pytest.mark.parametrize(("bf16", "layouts"), [(False, FP32), (True, BF16)], ids=["fp32", "bf16"])
def test_every_layout_loads_what_every_other_saved(tmp_path: Path, bf16: bool, layouts) -> None:
    model = make_model(tmp_path / "model", tied=not bf16, layers=4)
    source = tmp_path / "reference"
    (truth,) = spawn(reference, 1, model, source, bf16)
    saved = values(source / SAVED)
    assert len(saved) == 4 * sum("exp_avg_sq" in key for key in saved) >= 40  # weight, fp32 value, two moments
    for part, (world, grids) in enumerate(layouts):
        directories = [tmp_path / f"{part}.{index}" for index in range(len(grids))]
        numbers = spawn(visit, world, model, source, directories, grids, bf16)[0]
        for directory, grid, got in zip(directories, grids, numbers, strict=True):
            where = f"{grid} on {world} ranks, from {source.name}"
            ours = values(directory / SAVED)
            assert ours.keys() == saved.keys()
            different = [key for key in saved if not torch.equal(ours[key], saved[key])]
            assert not different, f"{where}: {different}"
            # The second step's numbers follow from both moments. bf16 rounds activations; where depends on the grid.
            error = (torch.tensor(got) / torch.tensor(truth) - 1).abs().max()
            assert error <= (2e-2 if bf16 else 1e-6), where
            source = directory
