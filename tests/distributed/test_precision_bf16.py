"""bf16 with fp32 main gradients: as near to the exact gradients as transformers in bf16 is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_divergence, dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from megatron_trd.records import Sample
from tests.distributed.parity import build, pack_step
from tiny_models import make_model, make_samples

OBJECTIVE = ObjectiveConfig()
TOLERANCE = 1.5
"""Largest error of all gradients together, in errors of transformers."""
TOLERANCE_OF_ONE = 3.0
"""The same of a single parameter: roundings of a small tensor are few."""


def in_bf16(path: Path, teacher_path: Path, samples: list[Sample]) -> dict[str, Tensor]:
    """Gradients from transformers, weights and activations in bf16, the divergence in fp32."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).train()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.bfloat16).eval()
    total = {name: torch.zeros(p.shape) for name, p in student.named_parameters()}
    for s in samples:
        q, p = (
            model(torch.tensor([prompt + s.response_ids])).logits[0, len(prompt) - 1 : -1].float()
            for model, prompt in ((student, s.student_prompt_ids), (teacher, s.teacher_prompt_ids))
        )
        (dense_divergence(OBJECTIVE, q, p.detach()).mean() / len(samples)).backward()
        for name, parameter in student.named_parameters():
            total[name] += parameter.grad.float()
            parameter.grad = None
    return total


def check(rank: int, world: int, root: str, fused: bool) -> None:
    from megatron_trd.mcore.groups import initialize_groups

    student_path, teacher_path, samples = Path(root) / "student", Path(root) / "teacher", make_samples(6)
    parallel = ParallelConfig(tensor_model_parallel_size=world, sequence_parallel=world > 1)
    groups = initialize_groups(parallel, 1, 0)
    student, teacher = build(
        student_path,
        teacher_path,
        groups,
        parallel,
        mode="opd",
        lora=False,
        bf16=True,
        gradient_accumulation_fusion=fused,
    )
    assert all(p.dtype == torch.bfloat16 and p.main_grad.dtype == torch.float32 for p in student.gpt.parameters())
    batch = pack_step(samples, groups, parallel, max_tokens=60, normalization=OBJECTIVE.loss_normalization)
    assert len(batch[0]) > 1
    loss = loss_of_all_ranks(student.accumulate_gradients(batch[0], teacher), groups)
    for p in student.gpt.parameters():
        p.data = p.data.float()  # the export shall not round the gradients
    grads = gradients(student, groups)
    if rank:
        return
    expected_loss, expected = dense_reference(OBJECTIVE, samples, student_path, teacher_path)
    other = in_bf16(student_path, teacher_path, samples)
    assert abs(loss.item() - expected_loss) < 0.02 * expected_loss
    assert grads.keys() == expected.keys() == other.keys()

    def error(of: dict[str, Tensor], name: str) -> float:
        return (of[name].double() - expected[name]).norm().item()

    ours, theirs = ([error(of, name) ** 2 for name in expected] for of in (grads, other))
    assert sum(ours) <= TOLERANCE**2 * sum(theirs), (sum(ours) ** 0.5, sum(theirs) ** 0.5)
    exact = sum(g.norm().item() ** 2 for g in expected.values())
    assert 1e-4 < (sum(theirs) / exact) ** 0.5 < 0.1  # a measure worth its name
    for name, mine, his in zip(expected, ours, theirs, strict=True):
        assert mine <= TOLERANCE_OF_ONE**2 * his, (name, mine**0.5, his**0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, settings in (("student", {"tied": True, "seed": 1}), ("teacher", {"hidden": 48, "seed": 2})):
        path = make_model(root / name, **settings) / "model.safetensors"
        rounded = {key: weight.bfloat16() for key, weight in load_file(path).items()}  # all three compute with these
        save_file(rounded, path, metadata={"format": "pt"})
    return root


@pytest.mark.parametrize(("world", "fused"), [(1, False), (2, True)])
def test_bf16_gradients_are_as_near_to_exact_ones_as_transformers(models: Path, world: int, fused: bool) -> None:
    spawn(check, world, str(models), fused, timeout_s=120)
