"""From samples to packed token streams: one response, two contexts.

Shape letters: N sequences, T packed tokens, R response tokens.

Each micro-batch holds two streams, `[student prompt | y]` and `[teacher prompt | y]` back to back over its
sequences, and one list of R response tokens common to both. `lay_out` is the only place that knows which
position predicts which token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.records import Sample

UNKNOWN, INCORRECT, CORRECT = -1, 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStream:
    """Sequences back to back, each followed by its padding, if it needs any. On the CPU; `to` moves it."""

    input_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [N + 1] int32, padding included, cu_seqlens[-1] == T
    max_seqlen: int
    response_positions: Tensor  # [R] int64: the position whose hidden state predicts response token r
    is_padding: Tensor  # [T] bool

    def to(self, device: torch.device) -> PackedStream:
        return PackedStream(
            input_ids=self.input_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
            response_positions=self.response_positions.to(device),
            is_padding=self.is_padding.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass of one data-parallel rank needs."""

    student: PackedStream
    teacher: PackedStream
    response_ids: Tensor  # [R] int64
    token_weight: Tensor  # [R] fp32, sums to 1 over the whole step (all ranks and micro-batches)
    y_o_correct: Tensor  # [R] int8: CORRECT, INCORRECT or UNKNOWN
    num_sequences: int

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            student=self.student.to(device),
            teacher=self.teacher.to(device),
            response_ids=self.response_ids.to(device),
            token_weight=self.token_weight.to(device),
            y_o_correct=self.y_o_correct.to(device),
            num_sequences=self.num_sequences,
        )


StepBatch = tuple[tuple[MicroBatch, ...], ...]
"""One optimizer step: `[data-parallel rank][micro-batch]`, equally many micro-batches on every rank."""


def counts(steps: Sequence[StepBatch]) -> dict[str, float]:
    """Return, as metric tags, the sequences and response tokens that packed steps hold."""
    batches = [batch for step in steps for rank in step for batch in rank]
    return {
        "train/sequences": float(sum(batch.num_sequences for batch in batches)),
        "train/response_tokens": float(sum(batch.response_ids.numel() for batch in batches)),
    }


def lay_out(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[list[int], range]:
    """Return one sequence's input ids and, for each response token, the position that predicts it.

    The token at position i predicts position i + 1, so response token r is predicted at
    `len(prompt) - 1 + r`; the last response token predicts nothing and is left out of the input.

    Raises:
        ValueError: the prompt or the response is empty.
    """
    if not prompt_ids or not response_ids:
        raise ValueError(f"a sequence needs a prompt and a response; got {len(prompt_ids)} and {len(response_ids)} ids")
    first = len(prompt_ids) - 1
    return [*prompt_ids, *response_ids[:-1]], range(first, first + len(response_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiples:
    """What the grid of ranks asks of a batch's sizes."""

    sequence: int = 1
    """Each sequence is padded to a multiple: context parallelism cuts it into 2 cp chunks."""
    stream: int = 1
    """So is each stream at its end: sequence parallelism cuts a rank's slice of it."""
    micro_batches: int = 1
    """Of a rank in a step: the interleaved schedule takes one for each pipeline stage at a time."""

    @classmethod
    def of(cls, parallel: ParallelConfig, tokens_of_rank: int = 1) -> Multiples:
        """Return what a grid asks for, and matrix products that want a multiple of `tokens_of_rank` on each rank."""
        cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
        sequence = 2 * cp if cp > 1 else 1
        shards = tp if parallel.sequence_parallel else 1
        interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
        return cls(
            sequence=sequence,
            stream=math.lcm(sequence * shards, cp * shards * tokens_of_rank),
            micro_batches=parallel.pipeline_model_parallel_size if interleaved else 1,
        )


def pack(
    samples: Sequence[Sample],
    *,
    num_steps: int,
    dp_size: int,
    max_tokens: int,
    multiples: Multiples,
    normalization: Literal["sequence", "token"],
) -> list[StepBatch]:
    """Split samples into `num_steps` steps, balance them over ranks and micro-batches, and pack.

    Args:
        samples: at least one.
        max_tokens: most tokens of one micro-batch, for its longer stream, without padding; a longer sequence goes
            alone.
        normalization: the loss of a step is the mean over sequences of the token mean (`sequence`), or the
            mean over all its tokens (`token`).

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("zero usable samples: nothing to train on; see --on-bad-refinement and --trajectory-filter")
    num_steps = min(num_steps, len(samples))
    bounds = [len(samples) * step // num_steps for step in range(num_steps + 1)]
    return [
        _pack_step(samples[start:end], dp_size, max_tokens, multiples, normalization)
        for start, end in itertools.pairwise(bounds)
    ]


def pack_in_order(samples: Sequence[Sample], multiples: Multiples) -> MicroBatch:
    """Pack samples into one micro-batch in their order, every token with the same weight."""
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    return _pack_micro_batch(samples, [1.0 / num_tokens] * len(samples), multiples)


def _pack_step(
    samples: Sequence[Sample], dp_size: int, max_tokens: int, multiples: Multiples, normalization: str
) -> StepBatch:
    num_tokens = sum(len(sample.response_ids) for sample in samples)

    def weight(sample: Sample) -> float:
        if normalization == "token":
            return 1.0 / num_tokens
        return 1.0 / (len(samples) * len(sample.response_ids))

    ranks = _spread(samples, dp_size)
    num_micro_batches = max(_bins_needed(rank, max_tokens) for rank in ranks)
    num_micro_batches += -num_micro_batches % multiples.micro_batches
    while True:  # spreading by total cost may overfill a bin that first-fit did not
        micro_batches = [_spread(rank, num_micro_batches) for rank in ranks]
        if all(len(m) <= 1 or _longer_stream(m) <= max_tokens for rank in micro_batches for m in rank):
            break
        num_micro_batches += multiples.micro_batches
    return tuple(tuple(_pack_micro_batch(m, [weight(s) for s in m], multiples) for m in rank) for rank in micro_batches)


def stream_lengths(sample: Sample) -> tuple[int, int]:
    """Tokens that one sample takes in the student's and in the teacher's stream."""
    response = len(sample.response_ids) - 1
    return len(sample.student_prompt_ids) + response, len(sample.teacher_prompt_ids) + response


def _longer_stream(samples: Sequence[Sample]) -> int:
    return max(sum(lengths) for lengths in zip(*map(stream_lengths, samples), strict=True))


def _spread(samples: Sequence[Sample], num_bins: int) -> list[list[Sample]]:
    """Longest first into the emptiest bin; cost = tokens of both streams."""
    bins: list[list[Sample]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for sample in sorted(samples, key=lambda s: -sum(stream_lengths(s))):
        emptiest = loads.index(min(loads))
        bins[emptiest].append(sample)
        loads[emptiest] += sum(stream_lengths(sample))
    return bins


def _bins_needed(samples: Sequence[Sample], max_tokens: int) -> int:
    """First-fit bound on the micro-batches one rank needs (at least one, even with no samples)."""
    bins: list[tuple[int, int]] = []
    for student, teacher in sorted(map(stream_lengths, samples), reverse=True):
        for i, (s, t) in enumerate(bins):
            if max(s + student, t + teacher) <= max_tokens:
                bins[i] = (s + student, t + teacher)
                break
        else:
            bins.append((student, teacher))
    return max(1, len(bins))


def _pack_micro_batch(samples: Sequence[Sample], weights: Sequence[float], multiples: Multiples) -> MicroBatch:
    """Pack one micro-batch. With no samples it is a stream of padding without response tokens: ranks that ran
    out of sequences still take part in every collective."""
    lengths = [len(s.response_ids) for s in samples]
    verdicts = [UNKNOWN if s.y_o_correct is None else (CORRECT if s.y_o_correct else INCORRECT) for s in samples]
    repeats = torch.tensor(lengths, dtype=torch.int64)
    return MicroBatch(
        student=_pack_stream([lay_out(s.student_prompt_ids, s.response_ids) for s in samples], multiples),
        teacher=_pack_stream([lay_out(s.teacher_prompt_ids, s.response_ids) for s in samples], multiples),
        response_ids=torch.tensor([i for s in samples for i in s.response_ids], dtype=torch.int64),
        token_weight=torch.tensor(weights, dtype=torch.float32).repeat_interleave(repeats),
        y_o_correct=torch.tensor(verdicts, dtype=torch.int8).repeat_interleave(repeats),
        num_sequences=len(samples),
    )


def _pack_stream(sequences: Sequence[tuple[list[int], range]], multiples: Multiples) -> PackedStream:
    ids: list[int] = []
    is_padding: list[bool] = []
    positions: list[int] = []
    bounds = [0]
    for input_ids, predicting in sequences:
        positions += [len(ids) + i for i in predicting]
        padding = -len(input_ids) % multiples.sequence  # behind all tokens, so none attends to it
        ids += input_ids + [0] * padding
        is_padding += [False] * len(input_ids) + [True] * padding
        bounds.append(len(ids))
    padding = -len(ids) % multiples.stream if ids else multiples.stream
    if padding:  # a sequence of its own, so nothing attends to it
        ids += [0] * padding
        is_padding += [True] * padding
        bounds.append(len(ids))
    return PackedStream(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(bounds)),
        response_positions=torch.tensor(positions, dtype=torch.int64),
        is_padding=torch.tensor(is_padding, dtype=torch.bool),
    )
