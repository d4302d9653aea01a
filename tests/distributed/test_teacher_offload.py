"""A teacher whose weights and hidden states wait in host memory gives the same numbers as one that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import spawn
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ParallelConfig
from megatron_trd.mcore.offload import BoundedRows, OffloadedWeights
from tests.distributed.parity import build, pack_step
from tiny_models import make_model, make_samples


def check_offload(rank: int, world: int, root: str, tied: bool) -> tuple[int, int]:
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.teacher import Teacher

    torch.set_num_threads(1)
    parallel = ParallelConfig(pipeline_model_parallel_size=world)
    groups = initialize_groups(parallel, 1, 0)
    teacher_path = Path(root) / ("tied" if tied else "untied")
    student, stays = build(Path(root) / "student", teacher_path, groups, parallel, mode="opd", lora=False)
    batch = pack_step(make_samples(5), groups, parallel, max_tokens=40)
    streams = [micro_batch.teacher for micro_batch in batch[0]]
    assert len(streams) > 2
    expected = [rows.clone() for rows in stays.rows(streams)]
    loss = loss_of_all_ranks(student.accumulate_gradients(batch[0], stays), groups)
    grads = {name: gradient.clone() for name, gradient in gradients(student, groups).items()}

    total = sum(p.numel() * 4 for p in stays._model.parameters())
    leaves = Teacher(stays._model, groups, max_hidden_bytes=expected[0].nbytes if expected else 0, offload=True)
    found = list(leaves.rows(streams))
    assert len(found) == len(expected) == (len(streams) if groups.is_last_stage else 0)
    assert all(map(torch.equal, found, expected))
    again = loss_of_all_ranks(student.accumulate_gradients(batch[0], leaves), groups)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, grads[name]) for name, gradient in gradients(student, groups).items())
    assert leaves._offloaded is not None
    return leaves._offloaded.num_bytes, total


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "student", tied=True, layers=2, seed=1)
    make_model(root / "tied", tied=True, hidden=48, layers=2, seed=2)
    make_model(root / "untied", tied=False, hidden=48, layers=2, seed=3)
    return root


@pytest.mark.parametrize(("stages", "tied"), [(1, True), (1, False), (2, True), (2, False)])
def test_the_same_numbers(models: Path, stages: int, tied: bool) -> None:
    sizes = spawn(check_offload, stages, str(models), tied, timeout_s=120)
    head = 96 * 48 * 4  # padded vocabulary x hidden x fp32
    for stage, (offloaded, total) in enumerate(sizes):
        last = stage == stages - 1
        assert offloaded == total - (head if last else 0)  # all but the output layer, which the loss needs


def test_weights_visit_and_leave() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0), requires_grad=False)
    weights = OffloadedWeights([parameter], torch.device("cpu"))
    waiting = parameter.data_ptr()
    with pytest.raises(RuntimeError, match="broken"), weights.on_device():
        assert parameter.data_ptr() != waiting and torch.equal(parameter, torch.arange(6.0))
        raise RuntimeError("broken")
    assert parameter.data_ptr() == waiting and torch.equal(parameter, torch.arange(6.0))


def test_rows_past_the_budget_wait_on_the_host() -> None:
    rows = [torch.full((4, 8), float(i)) for i in range(5)]  # 128 bytes each
    bounded = BoundedRows(300, torch.device("cpu"))
    kept = [bounded.keep(r) for r in rows]
    assert (bounded.device_bytes, bounded.host_bytes) == (256, 384)
    assert [k.data_ptr() == r.data_ptr() for k, r in zip(kept, rows, strict=True)] == [True, True, False, False, False]
    assert all(map(torch.equal, bounded.hand_out(kept), rows))
