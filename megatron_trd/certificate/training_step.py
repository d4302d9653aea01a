"""One step of a run, and what it left behind, under Hugging Face names: loss, gradients, norm, weights, copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.certificate.narrow_copy import NarrowRun
from megatron_trd.config.schema import Config
from megatron_trd.data.packing import MicroBatch, Multiples, PackedStream, pack
from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.gpt import GPTChunks
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.lora import LoRALinear
from megatron_trd.mcore.student import Student
from megatron_trd.mcore.teacher import Teacher, build_teacher
from megatron_trd.objectives.diagnostics import Sums

POISON = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTaken:
    """What every rank knows of the step; tensors are whole, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]
    """fp32, before clipping."""
    grad_norm: float
    before: dict[str, Tensor]
    """What is trained: all weights, or the adapter under PEFT's names."""
    after: dict[str, Tensor]
    unequal_copies: tuple[str, ...]
    """Parameters of which two ranks hold different bits after the step."""


def take_step(run: NarrowRun, groups: Groups, student_hf: HFModel, teacher_hf: HFModel) -> StepTaken:
    """Take one step. Collective over all ranks.

    Args:
        student_hf, teacher_hf: of the narrow models, padded.
    """
    student, teacher = build_poisoned(run.config, groups, student_hf, teacher_hf, run.common_vocab)
    if run.config.lora.lora_rank:
        randomize_adapters(student.gpt, groups)
        student.optimizer.reload_model_params()
    before = _trained(student)
    loss = loss_of_all_ranks(student.accumulate_gradients(micro_batches(run, groups), teacher), groups)
    grads = {name: tensor.cpu() for name, tensor in gradients(student, groups).items()}
    _, grad_norm, _ = student.optimizer.step()
    after = _trained(student)
    return StepTaken(
        loss=loss.item(),
        gradients=grads,
        grad_norm=float(grad_norm),
        before=before,
        after=after,
        unequal_copies=unequal_copies(student.gpt, groups),
    )


def micro_batches(run: NarrowRun, groups: Groups) -> list[MicroBatch]:
    """Return this rank's micro-batches, with padding that reads as tokens."""
    (batch,) = pack(
        run.samples,
        num_steps=1,
        dp_size=groups.dp_size,
        max_tokens=run.max_tokens,
        multiples=Multiples.of(run.config.parallel, run.config.model.tokens_multiple),
        normalization=run.config.objective.loss_normalization,
    )
    mine = batch[groups.dp_rank]
    return [replace(m, student=_poisoned(m.student), teacher=_poisoned(m.teacher)) for m in mine]


def _poisoned(stream: PackedStream) -> PackedStream:
    tokens = stream.input_ids[~stream.is_padding]
    if not len(tokens):
        return stream
    other = tokens[torch.arange(len(stream.input_ids)) % len(tokens)]
    return replace(stream, input_ids=torch.where(stream.is_padding, other, stream.input_ids))


def build_poisoned(
    config: Config, groups: Groups, student_hf: HFModel, teacher_hf: HFModel, vocab_size: int
) -> tuple[Student, Teacher]:
    """Build student and teacher; the padding rows of their heads would win any softmax."""
    student = Student(config, groups, student_hf, total_steps=4, vocab_size=vocab_size, epistemic_ids=[0])
    teacher = build_teacher(config, groups, student.gpt, teacher_hf)
    for model in (student.gpt, teacher._model):
        heads = [model.output_weight] if groups.is_last_stage else []
        if model.hf.tied and groups.pp_rank == 0:
            heads.append(model.chunks[0].embedding.word_embeddings.weight)
        for head in heads:
            rows = head.size(0)
            head.data[max(0, min(rows, model.hf.geometry.vocab_size - groups.tp_rank * rows)) :] = POISON
    return student, teacher


def randomize_adapters(model: GPTChunks, groups: Groups) -> None:
    """Draw adapters as large as narrow weights, equal where ranks hold the same one: with B = 0, A has no gradient."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for index, module in enumerate(adapted):
        rank, inputs = module.lora_a.shape
        size = math.sqrt(1.28 / (module.lora_scale * math.sqrt(rank * inputs)))
        for number, parameter in enumerate((module.lora_a, module.lora_b)):
            split = getattr(parameter, "tensor_model_parallel", False)
            seed = 100_000 * groups.pp_rank + 2000 * index + 1000 * number + (groups.tp_rank + 1 if split else 0)
            generator = torch.Generator().manual_seed(seed)
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))


def _export(student: Student) -> dict[str, Tensor]:
    export = hf_weights.export_adapter if student.config.lora.lora_rank else hf_weights.export
    return {name: tensor.clone() for name, tensor in export(student.gpt, student.groups)}


def _trained(student: Student) -> dict[str, Tensor]:
    student.wait_for_parameters()
    return {name: tensor.cpu() for name, tensor in _export(student).items()}


def gradients(student: Student, groups: Groups) -> dict[str, Tensor]:
    """Return the `main_grad`s, fp32, under Hugging Face names: the export, with gradients in the place of weights.

    Collective over all ranks.
    """
    if student.config.parallel.use_distributed_optimizer:  # each rank holds the sums of its shard
        for ddp in student.ddp:
            for buffers, group in ((ddp.buffers, groups.dp_cp), (ddp.expert_parallel_buffers, groups.expert_dp)):
                for bucket in (b for buffer in buffers for b in buffer.buckets):
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    with _gradients_as_weights(student.gpt):
        return _export(student)


@contextmanager
def _gradients_as_weights(model: GPTChunks) -> Iterator[None]:
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    for parameter, _ in kept:
        parameter.data = parameter.main_grad  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def loss_of_all_ranks(sums: Sequence[Sums], groups: Groups) -> Tensor:
    """Return the step's loss, an fp64 scalar, from what every rank's micro-batches report."""
    start = torch.zeros((), dtype=torch.float64, device=groups.device)
    loss = torch.stack([start, *(s["loss"][0] for s in sums)]).sum()
    dist.all_reduce(loss)
    return loss / groups.tp_size  # which all have the same


def unequal_copies(model: GPTChunks, groups: Groups) -> tuple[str, ...]:
    """Name the parameters of which two ranks hold different bits. Collective over all ranks.

    Copies are on data- and context-parallel ranks; on tensor-parallel ones where a parameter is not split; and a tied
    embedding is on the first and the last stage.
    """
    own, shared, experts = {}, {}, {}
    for name, parameter in model.named_parameters():
        name = f"{name} (pipeline stage {groups.pp_rank})"
        if not getattr(parameter, "allreduce", True):
            experts[name] = _bits(parameter)
            continue
        own[name] = _bits(parameter)
        if not getattr(parameter, "tensor_model_parallel", False):
            shared[name] = own[name]
    tied = {}
    if model.hf.tied and groups.pp_size > 1:
        if groups.is_last_stage:
            tied["embedding (first and last stage)"] = _bits(model.output_weight)
        elif groups.pp_rank == 0:
            tied["embedding (first and last stage)"] = _bits(model.chunks[0].embedding.word_embeddings.weight)
    found: set[str] = set()
    for bits, group in ((own, groups.dp_cp), (shared, groups.tp), (experts, groups.expert_dp), (tied, groups.pp)):
        found |= _unequal(bits, group)
    everywhere: list[set[str]] = [set()] * groups.world_size
    dist.all_gather_object(everywhere, found)
    return tuple(sorted(set().union(*everywhere)))


def _bits(parameter: Tensor) -> tuple[int, int]:
    """A checksum: the sum of the numbers read as integers, and the same weighted by their place."""
    data = parameter.detach().contiguous().reshape(-1)
    whole = data.view(torch.int16 if data.element_size() == 2 else torch.int32).long()
    return int(whole.sum()), int((whole * torch.arange(1, whole.numel() + 1, device=whole.device)).sum())


def _unequal(bits: dict[str, tuple[int, int]], group: dist.ProcessGroup) -> set[str]:
    of_all: list[dict[str, tuple[int, int]]] = [{}] * group.size()
    dist.all_gather_object(of_all, bits, group=group)
    first: dict[str, tuple[int, int]] = {}
    for other in of_all:
        first = {**other, **first}
    return {name for other in of_all for name, value in other.items() if value != first[name]}
