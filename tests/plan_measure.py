"""Real optimizer steps and the bytes they take, beside what the planner says: on the CPU, or where CUDA is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_trd.config.schema import Config
from megatron_trd.planning.activations import Implementation, Stream
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.memory import StageMemory, StepShape, stage_memory
from megatron_trd.planning.plan import read_models
from megatron_trd.records import Sample

VOCAB = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rank."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    """Moments and main weights."""
    peak: int
    """What a step holds at once beside the three."""
    step: StepShape


def write_model(path: Path, family: str = "qwen3", **settings: object) -> Path:
    """Write a random model whose layers are large enough to be seen beside its vocabulary."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        **{"tie_word_embeddings": False, **settings},
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def samples(number: int, teacher_prompt: int = 80) -> list[Sample]:
    """Sequences of unequal lengths: 200 to 256 tokens of the student's stream."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())

    return [
        Sample(
            problem_id=str(i),
            student_prompt_ids=ids(64),
            teacher_prompt_ids=ids(teacher_prompt),
            response_ids=ids(137 + 56 * i // max(number - 1, 1)),
            y_o_correct=None,
        )
        for i in range(number)
    ]


def measure(rank: int, world: int, config: Config, number: int, local_rank: int = 0) -> Measured:
    """Train one step to warm up and then under the meter. Runs on every rank of the job."""
    from megatron_trd.data.packing import Multiples, pack
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    groups = initialize_groups(config.parallel, 1, local_rank)
    hf = read_hf_model(config.model.hf_checkpoint, "hf-checkpoint", groups.tp_size)
    hf = hf.padded_to(padded_vocab_size(VOCAB, 1, groups.tp_size))
    student = Student(config, groups, hf, total_steps=4, vocab_size=VOCAB, epistemic_ids=[1])
    teacher = build_teacher(config, groups, student.gpt, hf)
    (step,) = pack(
        samples(number),
        num_steps=1,
        dp_size=groups.dp_size,
        max_tokens=config.data.max_tokens_per_micro_batch,
        multiples=Multiples.of(config.parallel),
        normalization="sequence",
    )
    mine = step[groups.dp_rank]
    student.train_step(mine, teacher)
    # On a busy machine gloo's threads hold buffers after their collective: the step with the least of it counts.
    peak = min(peak_bytes(lambda: student.train_step(mine, teacher)) for _ in range(1 if world == 1 else 4))
    largest = max(mine, key=lambda batch: batch.student.input_ids.numel())
    return Measured(
        stage=groups.pp_rank,
        parameters=sum(p.numel() * p.element_size() for p in student.gpt.parameters()),
        gradients=sum(b.grad_data.nbytes for ddp in student.ddp for b in _buffers(ddp)),
        optimizer=_optimizer_bytes(student.optimizer, bf16=config.model.bf16),
        peak=peak,
        step=StepShape(
            student=_stream(largest.student),
            teacher=_stream(largest.teacher),
            response_tokens=largest.response_ids.numel(),
            num_micro_batches=len(mine),
            step_response_tokens=sum(batch.response_ids.numel() for batch in mine),
        ),
    )


def predict(config: Config, world: int, measured: Measured, implementation: Implementation) -> StageMemory:
    """Return the planner's word on the same step."""
    grid = Grid.of(config.parallel, world)
    models = read_models(config, grid, "cpu" if implementation == "cpu" else "h200")
    assert models.precision.implementation == implementation
    return stage_memory(config, models, grid, measured.step, measured.stage)


def peak_bytes(step: Callable[[], object]) -> int:
    """Return what the allocator hands out during `step` at its highest, beyond what was out before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _stream(packed: Any) -> Stream:
    sequences = packed.cu_seqlens.numel() - 1
    return Stream(tokens=packed.input_ids.numel(), places=sequences * packed.max_seqlen)


def _buffers(ddp: Any) -> list[Any]:
    return [*ddp.buffers, *ddp.expert_parallel_buffers]


def _optimizer_bytes(optimizer: Any, *, bf16: bool) -> int:
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                total += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
                total += parameter.nbytes if bf16 else 0  # fp32 main weights; without bf16 the model's own
    return total
