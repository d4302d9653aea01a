"""Whole optimizer steps of the trainer against torch's AdamW on transformers, and the exact zero of self-teaching."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.config.schema import (
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
)
from tests.distributed.parity import pack_step
from tiny_models import VOCAB, make_model, make_samples

STEPS = 4
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.1, clip_grad=0.5, lr_warmup_fraction=0.25)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=False)


def build(model: str, parallel: ParallelConfig, **method):
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    config = Config(
        method=MethodConfig(**method),
        model=ModelConfig(hf_checkpoint=model, bf16=False),
        parallel=parallel,
        optimizer=OPTIMIZER,
        data=DataConfig(trajectories="unused"),
    )
    groups = initialize_groups(parallel, 1, 0)
    hf = read_hf_model(model, "hf-checkpoint", groups.tp_size).padded_to(padded_vocab_size(VOCAB, 1, groups.tp_size))
    student = Student(config, groups, hf, total_steps=STEPS, vocab_size=VOCAB, epistemic_ids=[1])
    return student, build_teacher(config, groups, student.gpt, hf), groups


def packed(samples, groups, parallel: ParallelConfig):
    return pack_step(samples, groups, parallel, max_tokens=60)[groups.dp_rank]


def train(rank: int, world: int, model: str, parallel: ParallelConfig):
    student, teacher, groups = build(model, parallel, opsd_teacher="initial")
    results = [
        student.train_step(packed(make_samples(6, seed=step), groups, parallel), teacher) for step in range(STEPS)
    ]
    weights = {name: tensor.clone() for name, tensor in student.export()}
    return [(r.lr, r.grad_norm) for r in results], weights if rank == 0 else None


def expected_training(model: Path):
    """The same steps with torch.optim.AdamW in fp64, gradients from the dense reference."""
    weights = {k: v.double() for k, v in load_file(model / "model.safetensors").items()}
    leaves = {k: v.clone() for k, v in weights.items()}
    decay = [v for k, v in leaves.items() if v.ndim > 1]
    plain = [v for k, v in leaves.items() if v.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
    )
    low, warmup, trace = OPTIMIZER.lr / 10, 1, []
    for step in range(1, STEPS + 1):
        if step <= warmup:
            lr = OPTIMIZER.lr * step / warmup
        else:
            progress = (step - warmup) / (STEPS - warmup)
            lr = low + (OPTIMIZER.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))
        _, gradients = dense_reference(
            ObjectiveConfig(), make_samples(6, seed=step - 1), model, model, student_weights=leaves
        )
        for name, leaf in leaves.items():
            leaf.grad = gradients[name]
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), OPTIMIZER.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        trace.append((lr, norm.item()))
    return trace, leaves


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
        (
            4,
            ParallelConfig(
                pipeline_model_parallel_size=2,
                context_parallel_size=2,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
            ),
        ),
    ],
)
def test_steps_equal_adamw(model: Path, world: int, parallel: ParallelConfig) -> None:
    trace, weights = spawn(train, world, str(model), parallel, timeout_s=200)[0]
    expected_trace, expected = expected_training(model)
    torch.testing.assert_close(torch.tensor(trace).double(), torch.tensor(expected_trace).double(), rtol=1e-5, atol=0)
    assert all(norm > OPTIMIZER.clip_grad for _, norm in trace), "clipping must be at work"
    start = load_file(model / "model.safetensors")
    for name, tensor in expected.items():
        moved = (tensor - start[name].double()).norm()
        assert moved > 0
        assert (weights[name].double() - tensor).norm() <= 2e-3 * moved, name


def teach_itself(rank: int, world: int, model: str, parallel: ParallelConfig) -> tuple[float, float, int]:
    student, teacher, groups = build(model, parallel, opsd_teacher="current")
    batch = packed(make_samples(5, same_context=True), groups, parallel)
    sums = student.accumulate_gradients(batch, teacher)
    largest = max(p.main_grad.abs().max().item() for p in student.gpt.parameters())
    return sum(s["loss"][0].item() for s in sums), largest, len(batch)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(pipeline_model_parallel_size=2),
        ParallelConfig(context_parallel_size=2),
    ],
)
def test_a_student_that_teaches_itself_learns_exactly_nothing(model: Path, parallel: ParallelConfig) -> None:
    world = parallel.model_parallel_size
    for loss, largest_gradient, _ in spawn(teach_itself, world, str(model), parallel, timeout_s=120):
        assert loss == 0.0
        assert largest_gradient == 0.0
