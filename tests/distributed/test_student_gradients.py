"""Loss and every gradient of the real trainer against the fp64 dense reference.

Data is peaked, and the padding rows of the output layer are poisoned.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare, pack_step
from tiny_models import make_model, make_samples

OBJECTIVES = {
    "forward": ObjectiveConfig(),
    "reverse": ObjectiveConfig(divergence="reverse-kl"),
    "jsd": ObjectiveConfig(divergence="jsd", beta=0.3),
    "top-k": ObjectiveConfig(divergence="reverse-kl", teacher_top_k=8),
    "token-clip": ObjectiveConfig(token_clip=3.0),
    "entry-clip": ObjectiveConfig(entry_clip=0.5, loss_normalization="token"),
}
GRIDS = [(1, 1, False), (2, 2, False), (2, 2, True), (4, 4, False), (4, 4, True), (2, 1, False), (4, 2, True)]


def check_grid(rank: int, world: int, root: str, tp: int, sp: bool) -> None:
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    torch.set_num_threads(1)
    root = Path(root)
    samples = make_samples(5)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp)
    groups = initialize_groups(parallel, 1, 0)
    for mode, lora in itertools.product(("opsd", "opd"), (False, True)):
        student_path, teacher_path = root / "student", root / ("teacher" if mode == "opd" else "student")
        student, teacher = build(student_path, teacher_path, groups, parallel, mode=mode, lora=lora)
        adapter = None
        if lora:
            adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)}
        for name, objective in OBJECTIVES.items():
            student.config = replace(student.config, objective=objective)
            for max_tokens in (10_000, 40):  # one micro-batch, several
                batch = pack_step(
                    samples, groups, parallel, max_tokens=max_tokens, normalization=objective.loss_normalization
                )
                assert (len(batch[0]) > 1) == (max_tokens == 40) or groups.dp_size > 2
                sums = student.accumulate_gradients(batch[groups.dp_rank], teacher)
                loss = loss_of_all_ranks(sums, groups)
                grads = gradients(student, groups)
                if rank == 0:
                    where = f"{name} {mode} lora={lora} tp={tp} sp={sp} dp={groups.dp_size} max_tokens={max_tokens}"
                    compare(
                        where,
                        loss,
                        grads,
                        dense_reference(objective, samples, student_path, teacher_path, adapter, LORA),
                    )
    dist.barrier()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "student", tied=True, seed=1)
    make_model(root / "teacher", tied=False, hidden=48, layers=3, seed=2)
    return root


@pytest.mark.parametrize(("world", "tp", "sp"), GRIDS)
def test_loss_and_gradients_equal_the_dense_reference(models: Path, world: int, tp: int, sp: bool) -> None:
    spawn(check_grid, world, str(models), tp, sp, timeout_s=300)
