"""A trainer on a tiny model, and its loss and gradients beside those of the dense reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_trd.config.schema import Config, DataConfig, LoraConfig, MethodConfig, ModelConfig, ParallelConfig
from tiny_models import VOCAB

LORA = LoraConfig(lora_rank=4, lora_alpha=8.0)


def build(
    student_path: Path, teacher_path: Path, groups, parallel: ParallelConfig, *, mode: str, lora: bool, **model: object
):
    """Build student and teacher; the padding rows of their heads would win any softmax."""
    from megatron_trd.mcore.hf_config import common_padding, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    tp, opd = groups.tp_size, mode == "opd"
    config = Config(
        method=MethodConfig(mode=mode),
        model=ModelConfig(
            hf_checkpoint=str(student_path),
            teacher_hf_checkpoint=str(teacher_path) if opd else None,
            bf16=False,
            **model,
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
    if groups.is_last_stage:
        for model_with_head in {id(m): m for m in (student.gpt, teacher._model)}.values():
            poison(model_with_head, groups)
    if lora:
        randomize_adapters(student.gpt, groups)
    return student, teacher


def poison(model, groups) -> None:
    rows = model.output_weight.size(0)
    first = max(0, min(rows, VOCAB - groups.tp_rank * rows))
    model.output_weight.data[first:] = 50.0


def randomize_adapters(model, groups) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            split = getattr(parameter, "tensor_model_parallel", False)
            seed = 1000 * groups.pp_rank + 100 * index + (groups.tp_rank if split else 0)
            generator = torch.Generator().manual_seed(seed)
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def gradients(student, groups) -> dict[str, torch.Tensor]:
    """`main_grad`s under Hugging Face names: the tested export, with gradients in the place of weights."""
    from megatron_trd.mcore import hf_weights

    if student.config.parallel.use_distributed_optimizer:  # each rank holds the sums of its shard
        for bucket in (b for ddp in student.ddp for buffer in ddp.buffers for b in buffer.buckets):
            shard = bucket.grad_data.chunk(groups.dp_cp.size())[groups.dp_cp.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=groups.dp_cp)
    parameters = [p for p in student.gpt.parameters() if p.requires_grad]
    kept = [p.data.clone() for p in parameters]
    for p in parameters:
        p.data.copy_(p.main_grad)
    export = hf_weights.export_adapter if student.config.lora.lora_rank else hf_weights.export
    named = {k: v.clone() for k, v in export(student.gpt, groups)}
    for p, value in zip(parameters, kept, strict=True):
        p.data.copy_(value)
    return named


def loss_of_all_ranks(sums, groups) -> torch.Tensor:
    """The step's loss from what every rank's micro-batches report."""
    loss = torch.stack([torch.zeros((), dtype=torch.float64), *(s["loss"][0] for s in sums)]).sum()
    dist.all_reduce(loss)
    return loss / groups.tp_size  # which all have the same


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
