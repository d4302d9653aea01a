"""A trainer on a tiny model, and how near its loss and gradients must be to those of the dense reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_trd.config.schema import Config, DataConfig, LoraConfig, MethodConfig, ModelConfig, ParallelConfig
from megatron_trd.data.packing import Multiples, StepBatch, pack
from megatron_trd.records import Sample
from tiny_models import VOCAB

LORA = LoraConfig(lora_rank=4, lora_alpha=8.0)


def build(
    student_path: Path, teacher_path: Path, groups, parallel: ParallelConfig, *, mode: str, lora: bool, **model: object
):
    """Build student and teacher; the padding rows of their heads would win any softmax."""
    from megatron_trd.certificate.training_step import build_poisoned, randomize_adapters
    from megatron_trd.mcore.hf_config import common_padding, read_hf_model

    tp, opd = groups.tp_size, mode == "opd"
    config = Config(
        method=MethodConfig(mode=mode),
        model=ModelConfig(
            hf_checkpoint=str(student_path),
            teacher_hf_checkpoint=str(teacher_path) if opd else None,
            **{"bf16": False, **model},
        ),
        parallel=parallel,
        lora=LORA if lora else LoraConfig(),
        data=DataConfig(trajectories="unused"),
    )
    hf, teacher_hf = common_padding(
        read_hf_model(student_path, "hf-checkpoint", tp), read_hf_model(teacher_path, "hf-checkpoint", tp), 8, tp
    )
    student, teacher = build_poisoned(config, groups, hf, teacher_hf, VOCAB)
    if lora:
        randomize_adapters(student.gpt, groups)
    return student, teacher


def pack_step(
    samples: Sequence[Sample], groups, parallel: ParallelConfig, *, max_tokens: int, normalization: str = "sequence"
) -> StepBatch:
    """Pack samples into one optimizer step of a grid."""
    (step,) = pack(
        samples,
        num_steps=1,
        dp_size=groups.dp_size,
        max_tokens=max_tokens,
        multiples=Multiples.of(parallel),
        normalization=normalization,
    )
    return step


def compare(where: str, loss: torch.Tensor, grads: Mapping[str, torch.Tensor], expected) -> None:
    """Fail where loss or a gradient is off by more than 1e-5 of its size."""
    expected_loss, expected_grads = expected
    assert abs(loss.item() - expected_loss) <= 1e-5 * abs(expected_loss), (where, loss.item(), expected_loss)
    assert grads.keys() == expected_grads.keys(), grads.keys() ^ expected_grads.keys()
    # The scale of a parameter's gradient, or of all of them where its own is a sum that cancels.
    overall = max(g.norm() for g in expected_grads.values()).item()
    for name, gradient in expected_grads.items():
        error = (grads[name].double() - gradient).norm().item()
        assert error <= 1e-5 * max(gradient.norm().item(), 1e-2 * overall), (where, name, error, gradient.norm().item())
    assert overall > 1e-3, where
