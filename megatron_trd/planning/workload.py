"""How many tokens a run rolls out, refines and trains on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_trd.config.schema import Config
from megatron_trd.planning.activations import Stream
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.memory import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean lengths in tokens."""

    prompt: float
    y_o: float
    y_r: float
    reference: float
    """y*, which the teacher of OPSD sees."""

    @classmethod
    def assumed(cls, config: Config) -> Lengths:
        """Return what is taken where nothing is known: an eighth of the longest prompt, a quarter of the longest
        response for y_o, an eighth of it for y_r and y*."""
        rollout = config.rollout
        return cls(
            prompt=rollout.max_prompt_tokens / 8,
            y_o=rollout.max_response_tokens / 4,
            y_r=rollout.max_response_tokens / 8,
            reference=rollout.max_response_tokens / 8,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimizer step of one data-parallel rank, in the mean and at the most, and one iteration's rollout."""

    lengths: Lengths
    refines: bool
    problems: int
    """Of an iteration."""
    steps: int
    """Of an iteration."""
    longest_response: int
    refine_prompt: float
    student_length: float
    """Mean sequence of the student's stream."""
    teacher_length: float
    response_length: float
    micro_batches: int
    """Of a rank in a step."""
    sequences_per_micro_batch: float
    largest: StepShape
    """For memory: the fullest micro-batch that packing allows."""

    @classmethod
    def of(cls, config: Config, grid: Grid, lengths: Lengths) -> Workload:
        """Derive it from the flags."""
        rollout, data, opsd = config.rollout, config.data, config.method.mode == "opsd"
        refines = config.method.trajectory == "y_r"
        reference = lengths.reference if opsd else 0.0
        refine_prompt = min(lengths.prompt + lengths.y_o + reference, float(rollout.max_refine_prompt_tokens))
        response = lengths.y_r if refines else lengths.y_o
        student = lengths.prompt + response
        teacher = response + (refine_prompt if refines else lengths.prompt + reference)
        sequences = data.global_batch_size / grid.dp
        fitting = max(1, int(data.max_tokens_per_micro_batch // max(student, teacher)))
        number = math.ceil(sequences / fitting)
        if grid.virtual_stages > 1:
            number += -number % grid.pp
        longest = rollout.max_response_tokens
        student_most = max(data.max_tokens_per_micro_batch, rollout.max_prompt_tokens + longest)
        prompt_most = rollout.max_refine_prompt_tokens if refines else rollout.max_prompt_tokens
        teacher_most = max(data.max_tokens_per_micro_batch, prompt_most + longest)
        return cls(
            lengths=lengths,
            refines=refines,
            problems=data.rollout_batch_size,
            steps=data.rollout_batch_size // data.global_batch_size,
            longest_response=longest,
            refine_prompt=refine_prompt,
            student_length=student,
            teacher_length=teacher,
            response_length=response,
            micro_batches=number,
            sequences_per_micro_batch=sequences / number,
            largest=StepShape(
                student=Stream(tokens=student_most),
                teacher=Stream(tokens=teacher_most),
                response_tokens=student_most,
                num_micro_batches=number,
                step_response_tokens=max(student_most, round(sequences * response)),
            ),
        )
