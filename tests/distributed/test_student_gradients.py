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

from dense_reference import dense_reference
from launch import spawn
from megatron_trd.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
)
from tiny_models import VOCAB, make_model, make_samples

OBJECTIVES = {
    "forward": ObjectiveConfig(),
    "reverse": ObjectiveConfig(divergence="reverse-kl"),
    "jsd": ObjectiveConfig(divergence="jsd", beta=0.3),
    "top-k": ObjectiveConfig(divergence="reverse-kl", teacher_top_k=8),
    "token-clip": ObjectiveConfig(token_clip=3.0),
    "entry-clip": ObjectiveConfig(entry_clip=0.5, loss_normalization="token"),
}
LORA = LoraConfig(lora_rank=4, lora_alpha=8.0)
GRIDS = [(1, 1, False), (2, 2, False), (2, 2, True), (4, 4, False), (4, 4, True), (2, 1, False), (4, 2, True)]


def build(student_path, teacher_path, mode, lora, parallel, groups):
    from megatron_trd.mcore.hf_config import common_padding, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    tp = groups.tp_size
    opd = mode == "opd"
    config = Config(
        method=MethodConfig(mode=mode),
        model=ModelConfig(
            hf_checkpoint=str(student_path), teacher_hf_checkpoint=str(teacher_path) if opd else None, bf16=False
        ),
        parallel=parallel,
        lora=LORA if lora else LoraConfig(),
        data=DataConfig(trajectories="unused"),
    )
    hf, teacher_hf = common_padding(
        read_hf_model(student_path, "hf-checkpoint", tp), read_hf_model(teacher_path, "hf-checkpoint", tp), 8, tp
    )
    student = Student(config, groups, hf, total_steps=4, vocab_size=VOCAB, epistemic_ids=[3, 90])
    teacher = build_teacher(config, groups, student.gpt, teacher_hf)
    models = {id(m): m for m in (student.gpt, teacher._model)}.values()
    for model in models:
        poison(model, groups)
    if lora:
        randomize_adapters(student.gpt, groups)
    return student, teacher


def poison(model, groups) -> None:
    """Give the padding rows of the output layer logits that would win any softmax."""
    rows = model.output_weight.size(0)
    first = max(0, min(rows, VOCAB - groups.tp_rank * rows))
    model.output_weight.data[first:] = 50.0


def randomize_adapters(model, groups) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            split = getattr(parameter, "tensor_model_parallel", False)
            generator = torch.Generator().manual_seed(100 * index + (groups.tp_rank if split else 0))
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def gradients(student, groups, lora):
    """`main_grad`s under Hugging Face names: the tested export, with gradients in the place of weights."""
    from megatron_trd.mcore import hf_weights

    parameters = [p for p in student.gpt.parameters() if p.requires_grad]
    kept = [p.data.clone() for p in parameters]
    for p in parameters:
        p.data.copy_(p.main_grad)
    export = hf_weights.export_adapter if lora else hf_weights.export
    named = {k: v.clone() for k, v in export(student.gpt, groups)}
    for p, value in zip(parameters, kept, strict=True):
        p.data.copy_(value)
    return named


def check_grid(rank: int, world: int, root: str, tp: int, sp: bool) -> None:
    from megatron_trd.data.packing import pack
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    torch.set_num_threads(1)
    root = Path(root)
    samples = make_samples(5)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp)
    groups = initialize_groups(parallel, 1, 0)
    for mode, lora in itertools.product(("opsd", "opd"), (False, True)):
        student_path, teacher_path = root / "student", root / ("teacher" if mode == "opd" else "student")
        student, teacher = build(student_path, teacher_path, mode, lora, parallel, groups)
        adapter = None
        if lora:
            adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)}
        for name, objective in OBJECTIVES.items():
            student.config = replace(student.config, objective=objective)
            for max_tokens in (10_000, 40):  # one micro-batch, several
                (batch,) = pack(
                    samples,
                    num_steps=1,
                    dp_size=groups.dp_size,
                    max_tokens=max_tokens,
                    length_multiple=tp if sp else 1,
                    normalization=objective.loss_normalization,
                )
                assert (len(batch[0]) > 1) == (max_tokens == 40) or groups.dp_size > 2
                sums = student.accumulate_gradients(batch[groups.dp_rank], teacher)
                loss = torch.stack([s["loss"][0] for s in sums]).sum()
                dist.all_reduce(loss, group=groups.dp)
                grads = gradients(student, groups, lora)
                if rank == 0:
                    where = f"{name} {mode} lora={lora} tp={tp} sp={sp} dp={groups.dp_size} max_tokens={max_tokens}"
                    compare(
                        where,
                        loss,
                        grads,
                        dense_reference(objective, samples, student_path, teacher_path, adapter, LORA),
                    )
    dist.barrier()


def compare(where, loss, grads, expected) -> None:
    expected_loss, expected_grads = expected
    assert abs(loss.item() - expected_loss) <= 1e-5 * abs(expected_loss), (where, loss.item(), expected_loss)
    assert grads.keys() == expected_grads.keys(), grads.keys() ^ expected_grads.keys()
    # The scale of a parameter's gradient, or of all of them where its own is a sum that cancels.
    overall = max(g.norm() for g in expected_grads.values()).item()
    for name, gradient in expected_grads.items():
        error = (grads[name].double() - gradient).norm().item()
        assert error <= 1e-5 * max(gradient.norm().item(), 1e-2 * overall), (where, name, error, gradient.norm().item())
    assert overall > 1e-3, where


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "student", tied=True, seed=1)
    make_model(root / "teacher", tied=False, hidden=48, layers=3, seed=2)
    return root


@pytest.mark.parametrize(("world", "tp", "sp"), GRIDS)
def test_loss_and_gradients_equal_the_dense_reference(models: Path, world: int, tp: int, sp: bool) -> None:
    spawn(check_grid, world, str(models), tp, sp, timeout_s=300)
